"""The same experiment over video files and the commands of ``flashi2v``: ``--scale 1.3b``.

A recipe (``1.3b.yaml``) names folders of clips, encoders and flags. The generated world can be written as such folders
(``python -m paradigms.footage``), which tests this path at toy size.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_flashi2v.conditioning.build import paradigm_named
from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.config.evaluate import EvaluateConfig
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.evaluation.videos import common_shape, find_videos
from megatron_flashi2v.runtime.files import atomic_write_text, read_json_object
from paradigms.commands import FLASHI2V, UNFINISHED, checkpoint_of, iterations_done, words_of
from paradigms.ledger import Task
from paradigms.page import write_page
from paradigms.settings import PARADIGMS, SETS

STAGES = ("prepare", "train", "sample", "evaluate", "page")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Contents of the recipe.

    Attributes:
        train: annotations of the training clips, as ``flashi2v prepare`` takes them.
        trained: folder of ID.mp4, each with its caption in ID.txt: some of the training clips. All videos of the three
            sets have the length and size of the samples.
        held: likewise, others of the same domain.
        out: likewise, of another domain.
        iterations: at which each run is measured; the last ends it.
        prepare_flags: of ``flashi2v prepare``; likewise the three after it.
        seeds: of training.
        paradigms: to compare.
        launcher: words that start ``flashi2v`` on all devices; by default one process.
    """

    train: str
    trained: str
    held: str
    out: str
    iterations: list[int]
    prepare_flags: list[str]
    train_flags: list[str]
    sample_flags: list[str]
    evaluate_flags: list[str]
    seeds: list[int] = field(default_factory=lambda: [1])
    paradigms: list[str] = field(default_factory=lambda: list(PARADIGMS))
    launcher: list[str] = field(default_factory=lambda: list(FLASHI2V))


@dataclass(frozen=True, kw_only=True)
class FilesRun:
    """One experiment over files.

    Attributes:
        recipe: of the experiment.
        folder: of all that it makes.
    """

    recipe: Recipe
    folder: Path

    @property
    def stages(self) -> Sequence[str]:
        """In their order."""
        return STAGES

    def tasks(self, stage: str) -> list[Task]:
        """Of a stage."""
        recipe = self.recipe
        runs = [(paradigm, seed) for seed in recipe.seeds for paradigm in recipe.paradigms]
        if stage == "prepare":
            return [self._command("prepare", "prepare", {key: self._trained[key] for key in ("train", "prepare")}, [
                "prepare", "--annotations", recipe.train, "--output", self.folder / "data", *recipe.prepare_flags,
            ])]  # fmt: skip
        if stage == "train":
            return [
                self._command(stage, f"train/{paradigm}-{seed}", self._trained, [
                    "train", *recipe.train_flags, "--data-path", self.folder / "data", "--conditioning", paradigm,
                    "--seed", seed, "--train-iters", recipe.iterations[-1], "--save-interval", recipe.iterations[0],
                    "--exit-code-when-unfinished", UNFINISHED, "--save", self.folder / "train" / f"{paradigm}-{seed}",
                ])
                for paradigm, seed in runs
            ]  # fmt: skip
        if stage == "page":
            run = partial(make_page, self)
            return [Task(stage=stage, key=stage, settings=vars(recipe), run=run, is_cheap=True)]
        make = self._sample if stage == "sample" else self._evaluate
        return [
            make(paradigm, seed, iteration, name)
            for paradigm, seed in runs for iteration in recipe.iterations for name in SETS
        ]  # fmt: skip

    def iterations_of(self, task: Task) -> tuple[int, int] | None:
        """Iterations done and in all, of a task that trains; None of any other."""
        if task.stage != "train":
            return None
        total = self.recipe.iterations[-1]
        return min(iterations_done(self.folder / task.key), total), total

    def part(self, stage: str, paradigm: str, seed: int, iteration: int, name: str) -> Path:
        """Folder of one set's samples or measures."""
        return self.folder / stage / f"{paradigm}-{seed}" / f"{iteration:07d}" / name

    def _sample(self, paradigm: str, seed: int, iteration: int, name: str) -> Task:
        """Samples from the pictures of one set."""
        recipe, videos = self.recipe, self.part("sample", paradigm, seed, iteration, name)
        requests = videos.with_suffix(".jsonl")
        words = [
            "sample", *recipe.sample_flags, "--name", "{id}", "--requests", requests, "--output", videos, "--load",
            checkpoint_of(self.folder / "train" / f"{paradigm}-{seed}", iteration),
        ]  # fmt: skip
        task = self._command("sample", self._key("sample", paradigm, seed, iteration, name), self._sampled(name), words)
        return dataclasses.replace(task, run=partial(write_requests, Path(getattr(recipe, name)), requests))

    def _evaluate(self, paradigm: str, seed: int, iteration: int, name: str) -> Task:
        """Measures of those samples; one process makes them."""
        recipe, place = self.recipe, (paradigm, seed, iteration, name)
        words = [
            "evaluate", *recipe.evaluate_flags, "--videos", self.part("sample", *place), "--references",
            getattr(recipe, name), "--output", self.part("evaluate", *place),
        ]  # fmt: skip
        settings = {**self._sampled(name), "evaluate": recipe.evaluate_flags}
        task = self._command("evaluate", self._key("evaluate", *place), settings, words, launcher=FLASHI2V)
        return dataclasses.replace(task, is_cheap=True)

    @property
    def _trained(self) -> dict[str, Any]:
        """What decides a trained model."""
        recipe = self.recipe
        return {"train": recipe.train, "prepare": recipe.prepare_flags, "flags": recipe.train_flags,
                "end": recipe.iterations[-1], "save_interval": recipe.iterations[0]}  # fmt: skip

    def _sampled(self, name: str) -> dict[str, Any]:
        return {**self._trained, "clips": getattr(self.recipe, name), "sample": self.recipe.sample_flags}

    def _key(self, stage: str, paradigm: str, seed: int, iteration: int, name: str) -> str:
        return f"{stage}/{paradigm}-{seed}/{iteration}/{name}"

    def _command(
        self, stage: str, key: str, settings: dict[str, Any], words: Sequence[object],
        launcher: Sequence[str] | None = None,
    ) -> Task:  # fmt: skip
        return Task(
            stage=stage, key=key, settings=settings, command=words_of([*(launcher or self.recipe.launcher), *words]),
            log=self.folder / "logs" / f"{key.replace('/', '-')}.log",
        )  # fmt: skip


def read_recipe(path: Path, folder: Path) -> FilesRun:
    """Read a recipe, and check its clips and flags.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown or missing, or a command refuses its flags.
        DataError: a set's folder has no videos, or one without a caption, or videos of different shapes.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--recipe {path}: cannot be read ({error})") from error
    known = {one.name: one for one in fields(Recipe)}
    if not isinstance(values, dict) or not set(values) <= set(known):
        raise ConfigError(f"--recipe {path}: must map {', '.join(known)}, and no other keys")
    for name, one in known.items():
        kind = str if one.type == "str" else list
        if name not in values and kind is list and name in ("seeds", "paradigms", "launcher"):
            continue
        if not isinstance(values.get(name), kind) or not values[name]:
            raise ConfigError(f"--recipe {path}: {name} is {values.get(name)!r}; it must be a {kind.__name__}")
    recipe = Recipe(**values)
    _check_lists(recipe, path)
    run = FilesRun(recipe=recipe, folder=folder)
    _check_flags(run, path)
    found = {name: find_videos(Path(getattr(recipe, name)), name) for name in SETS}
    if len({len(videos) for videos in found.values()}) > 1:
        counts = ", ".join(f"{name} {len(videos)}" for name, videos in found.items())
        raise DataError(
            f"--recipe {path}: its sets have {counts} videos, and a Frechet distance falls with their number; give as "
            "many of each"
        )
    videos = [video for videos in found.values() for video in videos]
    for video in videos:
        if not video.with_suffix(".txt").is_file():
            raise DataError(f"{video}: has no caption; write it into {video.with_suffix('.txt')}")
    common_shape(videos, videos[0])
    return run


def _check_lists(recipe: Recipe, path: Path) -> None:
    for name, least in (("iterations", 1), ("seeds", 0)):
        numbers = getattr(recipe, name)
        whole = all(isinstance(number, int) and number >= least for number in numbers)
        if not whole or len(set(numbers)) < len(numbers):
            raise ConfigError(f"--recipe {path}: {name} are {numbers}; give different whole numbers from {least} on")
    first = recipe.iterations[0]
    if any(later % first for later in recipe.iterations) or recipe.iterations != sorted(recipe.iterations):
        raise ConfigError(f"--recipe {path}: iterations are {recipe.iterations}; give rising multiples of the first")
    if len(set(recipe.paradigms)) < len(recipe.paradigms):
        raise ConfigError(f"--recipe {path}: paradigms are {recipe.paradigms}; name each once")
    for name in recipe.paradigms:
        paradigm_named(name)
    if shutil.which(recipe.launcher[0]) is None:
        raise ConfigError(f"--recipe {path}: launcher is {recipe.launcher[0]!r} ...; no such program is on the PATH")


def _check_flags(run: FilesRun, path: Path) -> None:
    """Have each command read its words, before the first of them works for days."""
    commands = {"prepare": PrepareConfig, "train": TrainConfig, "sample": SampleConfig, "evaluate": EvaluateConfig}
    for stage, config in commands.items():
        for task in run.tasks(stage):
            words = task.command[task.command.index(stage) + 1 :]
            try:
                parse(config, words, prog=config.command, description="")
            except ConfigError as error:
                raise ConfigError(f"--recipe {path}: {stage}: {error}") from error


def write_requests(clips: Path, requests: Path) -> None:
    """One request for each clip of a folder."""
    rows = [
        {
            "id": video.stem,
            "image": str(video.resolve()),
            "prompt": video.with_suffix(".txt").read_text(encoding="utf-8").strip(),
        }
        for video in find_videos(clips, "clips")
    ]
    requests.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(requests, "".join(json.dumps(row) + "\n" for row in rows))


def make_page(run: FilesRun) -> None:
    """``report.json``, ``report.html`` and the curves' picture."""
    recipe = run.recipe
    rows = []
    real: dict[str, Any] = {}
    for paradigm in recipe.paradigms:
        for seed in recipe.seeds:
            for iteration in recipe.iterations:
                found = {
                    name: read_json_object(
                        run.part("evaluate", paradigm, seed, iteration, name) / "evaluation.json", error=DataError
                    )
                    for name in SETS
                }
                rows.append({
                    "paradigm": paradigm, "seed": seed, "iteration": iteration,
                    "sets": {name: figures_of(evaluation) for name, evaluation in found.items()},
                })  # fmt: skip
                real = {name: {"frechet": floor_of(evaluation)} for name, evaluation in found.items()}
    write_page(run.folder, {"settings": {"seeds": recipe.seeds, "recipe": vars(recipe)}, "real": real, "runs": rows})


def figures_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The page's figures from ``evaluation.json``.

    The distance is that of half of the videos to half of the references, as the floor is that of two halves of the
    references: it falls with the number of samples, so that only equal numbers compare. Its interval is over halvings.
    The law is not known, motion is the optical flow, and PSNR is that to the condition image.

    Raises:
        DataError: no reference moves.
    """
    motion, chunks = evaluation["motion"], evaluation["chunks"]
    if motion["frozen"]["share"] is None:
        raise DataError(
            f"{evaluation['videos']['references']}: none of these clips moves, so that nothing can be frozen beside "
            "them; give clips that move"
        )
    spread = {"mean": "videos", "low": "videos_low", "high": "videos_high"}
    return {
        "videos": evaluation["videos"]["videos_count"],
        "samples": chunks[0]["halves"]["samples"],
        "chunks": [[chunk["first_frame"], chunk["last_frame"]] for chunk in chunks],
        "frechet": {side: [max(0.0, one["halves"][name]) for one in chunks] for side, name in spread.items()},
        "frozen": {"mean": motion["frozen"]["share"], **{side: motion["frozen"][side] for side in ("low", "high")}},
        "path_share": motion["flow_ratio"],
        "motion": motion["flow"]["videos"],
        "psnr": evaluation["fidelity"]["psnr"]["videos"],
    }


def floor_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The distance of one half of the references to the other, by chunk."""
    return {"mean": [chunk["halves"]["references"] for chunk in evaluation["chunks"]]}
