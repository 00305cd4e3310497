"""The stages in pixels, each a list of tasks with the settings that decide them.

Everything lies in the run's folder: ``data/`` (shards), ``classifier/``, ``start/`` (text-to-video), ``train/RUN/``,
``samples/RUN/ITERATION/SET.safetensors``, ``figures/RUN/ITERATION.json``, ``logs/`` and the page; a RUN is
PARADIGM-SEED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object
from paradigms.classifier import load_classifier, save_classifier, train_classifier
from paradigms.commands import FLASHI2V, checkpoint_of, iterations_done, words_of
from paradigms.ledger import Task
from paradigms.measure import chance, frechet_chunks, measure_samples
from paradigms.page import write_page
from paradigms.pixels import write_shards
from paradigms.sampling import read_samples, sample_set
from paradigms.settings import SETS, Settings
from paradigms.training import save_interval, train_flags
from paradigms.world import Board, Clip, make_clip

STAGES = ("world", "classifier", "start", "train", "sample", "measure", "page")
WORLD = ("cells", "frames", "train_clips", "world_seed")
MODEL = ("layers", "hidden", "ffn", "heads", "batch", "train_shift", "train_flags", "start_iterations")
TESTS = ("test_clips", "solver_steps", "shift")
CLASSIFIER = ("classifier_clips", "classifier_steps")
MEASURES = ("chunk_frames", "resamples", *CLASSIFIER)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment in its folder.

    Attributes:
        settings: of the experiment.
        folder: of all files.
    """

    settings: Settings
    folder: Path

    @property
    def stages(self) -> Sequence[str]:
        """In their order."""
        return STAGES

    @property
    def board(self) -> Board:
        """Of all clips."""
        return Board(cells=self.settings.cells, frames=self.settings.frames)

    def train_clips(self) -> list[Clip]:
        """The training set."""
        return self._clips("in", "train", self.settings.train_clips)

    def test_clips(self, name: str, *, mirror: bool = False) -> list[Clip]:
        """The clips of a set, whose pictures are sampled from.

        Args:
            name: of :data:`~paradigms.settings.SETS`.
            mirror: as many others of the same domain, for the distance from real to real.
        """
        count = self.settings.test_clips[name]
        if mirror:
            return self._clips("out" if name == "out" else "in", f"mirror-{name}", count)
        if name == "trained":
            return self.train_clips()[:count]
        return self._clips("out" if name == "out" else "in", name, count)

    def training_runs(self) -> list[tuple[str, int]]:
        """Paradigm and seed of each run, one seed of all paradigms first."""
        return [(paradigm, seed) for seed in self.settings.seeds for paradigm in self.settings.paradigms]

    def tasks(self, stage: str) -> list[Task]:
        """Of a stage."""
        makers: dict[str, Any] = {
            "world": self._world, "classifier": self._classifier, "start": self._start, "train": self._train,
            "sample": self._sample, "measure": self._measure, "page": self._page,
        }
        return makers[stage]()

    def iterations_of(self, task: Task) -> tuple[int, int] | None:
        """Iterations done and in all, of a task that trains; None of any other."""
        if task.stage not in ("start", "train"):
            return None
        total = self.settings.start_iterations if task.stage == "start" else self.settings.iterations[-1]
        return min(iterations_done(self.folder / task.key), total), total

    def _world(self) -> list[Task]:
        run = partial(write_data, self)
        return [Task(stage="world", key="world", settings=self.settings.to_json(*WORLD), run=run)]

    def _classifier(self) -> list[Task]:
        settings = self.settings.to_json("cells", "frames", "world_seed", *CLASSIFIER)
        return [Task(stage="classifier", key="classifier", settings=settings, run=partial(write_classifier, self))]

    def _start(self) -> list[Task]:
        if not self.settings.start_iterations:
            return []
        return [self._training("start", "text_to_video", self.settings.seeds[0])]

    def _train(self) -> list[Task]:
        return [self._training("train", paradigm, seed) for paradigm, seed in self.training_runs()]

    def _training(self, stage: str, paradigm: str, seed: int) -> Task:
        start = self.run_folder("text_to_video", self.settings.seeds[0]) if self.settings.start_iterations else None
        flags = train_flags(self.settings, self.folder / "data", paradigm, seed, start)
        name = f"{paradigm}-{seed}"
        return Task(
            stage=stage,
            key=f"{stage}/{name}",
            settings=self._trained(paradigm),
            command=words_of([*FLASHI2V, "train", *flags, "--save", self.run_folder(paradigm, seed)]),
            log=self.folder / "logs" / f"{stage}-{name}.log",
        )

    def _sample(self) -> list[Task]:
        return [
            Task(
                stage="sample",
                key=f"sample/{paradigm}-{seed}/{iteration}/{name}",
                settings={**self._trained(paradigm), **self.settings.to_json(*TESTS)},
                run=partial(write_samples, self, paradigm, seed, iteration, name),
            )
            for paradigm, seed in self.training_runs() for iteration in self.settings.iterations for name in SETS
        ]  # fmt: skip

    def _measure(self) -> list[Task]:
        return [
            Task(
                stage="measure",
                key=f"measure/{paradigm}-{seed}/{iteration}",
                settings={**self._trained(paradigm), **self.settings.to_json(*TESTS, *MEASURES)},
                run=partial(write_figures, self, paradigm, seed, iteration),
                is_cheap=True,
            )
            for paradigm, seed in self.training_runs() for iteration in self.settings.iterations
        ]  # fmt: skip

    def _page(self) -> list[Task]:
        settings, run = self.settings.to_json(), partial(make_page, self)
        return [Task(stage="page", key="page", settings=settings, run=run, is_cheap=True)]

    def _trained(self, paradigm: str) -> dict[str, Any]:
        """What decides a trained model and its checkpoints; the last iteration ends the learning rate's decay."""
        own = list(self.settings.paradigm_flags.get(paradigm, ()))
        return {
            **self.settings.to_json(*WORLD, *MODEL), "end": self.settings.iterations[-1],
            "save_interval": save_interval(self.settings), "own_flags": own,
        }  # fmt: skip

    def run_folder(self, paradigm: str, seed: int) -> Path:
        """Of a training run."""
        return self.folder / ("start" if paradigm == "text_to_video" else "train") / f"{paradigm}-{seed}"

    def samples_file(self, paradigm: str, seed: int, iteration: int, name: str) -> Path:
        """Of one set's samples."""
        return self.folder / "samples" / f"{paradigm}-{seed}" / f"{iteration:07d}" / f"{name}.safetensors"

    def figures_file(self, paradigm: str, seed: int, iteration: int) -> Path:
        """Of all sets' figures."""
        return self.folder / "figures" / f"{paradigm}-{seed}" / f"{iteration:07d}.json"

    def _clips(self, domain: str, prefix: str, count: int) -> list[Clip]:
        return [
            make_clip(self.board, domain, self.settings.world_seed, f"{prefix}-{number:04d}") for number in range(count)
        ]


def write_data(run: Run) -> None:
    """The shards of the training set."""
    write_shards(run.folder / "data", run.train_clips(), run.board)


def write_classifier(run: Run) -> None:
    """The classifier's weights, and its accuracies on real clips."""
    folder = run.folder / "classifier"
    folder.mkdir(parents=True, exist_ok=True)
    settings = run.settings
    network, accuracies = train_classifier(
        run.board, settings.classifier_clips, settings.classifier_steps, settings.world_seed
    )
    save_classifier(network, folder / "weights.safetensors")
    atomic_write_json(folder / "accuracies.json", accuracies)


def write_samples(run: Run, paradigm: str, seed: int, iteration: int, name: str) -> None:
    """Samples of one checkpoint from one set's pictures."""
    sample_set(
        checkpoint_of(run.run_folder(paradigm, seed), iteration), run.test_clips(name), run.board,
        run.samples_file(paradigm, seed, iteration, name),
        solver_steps=run.settings.solver_steps, shift=run.settings.shift,
    )


def write_figures(run: Run, paradigm: str, seed: int, iteration: int) -> None:
    """Figures of one checkpoint's samples, of all sets."""
    network = load_classifier(run.folder / "classifier" / "weights.safetensors")
    figures = {}
    for name in SETS:
        frames, errors = read_samples(run.samples_file(paradigm, seed, iteration, name))
        figures[name] = measure_samples(
            run.test_clips(name), frames, network, chunk_frames=run.settings.chunk_frames,
            resamples=run.settings.resamples, x0_error_NT=errors,
        )
    path = run.figures_file(paradigm, seed, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, figures)


def real_figures(run: Run) -> dict[str, Any]:
    """By set: the distance between real clips and as many other real ones, and the chance of a right step."""
    network = load_classifier(run.folder / "classifier" / "weights.safetensors")
    found = {}
    for name in SETS:
        clips = run.test_clips(name)
        real, other = (
            np.stack([clip.frames_THWC for clip in side]) for side in (clips, run.test_clips(name, mirror=True))
        )
        floor = frechet_chunks(
            network, other, real, run.settings.chunk_frames, run.settings.resamples, np.random.default_rng(0)
        )
        found[name] = {"frechet": floor, "chance": chance(clips, run.board)}
    return found


def make_page(run: Run) -> None:
    """``report.json``, ``report.html`` and the curves' picture."""
    settings = run.settings
    runs = [
        {
            "paradigm": paradigm, "seed": seed, "iteration": iteration,
            "sets": read_json_object(run.figures_file(paradigm, seed, iteration)),
        }
        for paradigm, seed in run.training_runs() for iteration in settings.iterations
    ]  # fmt: skip
    report = {
        "settings": settings.to_json(),
        "classifier": read_json_object(run.folder / "classifier" / "accuracies.json"),
        "real": real_figures(run),
        "runs": runs,
    }
    write_page(run.folder, report, strips=sample_strips(run))


def sample_strips(run: Run, count: int = 3) -> list[dict[str, Any]]:
    """Frames of a few samples of each paradigm beside the true clips, at the end of training: set, label, frames."""
    rows = []
    for name in ("held", "out"):
        clips = run.test_clips(name)[:count]
        rows.append({"set": name, "label": "true", "frames": np.stack([clip.frames_THWC for clip in clips])})
        for paradigm in run.settings.paradigms:
            path = run.samples_file(paradigm, run.settings.seeds[0], run.settings.iterations[-1], name)
            rows.append({"set": name, "label": paradigm, "frames": read_samples(path)[0][:count]})
    return rows
