"""examples/paradigms run: every stage, resumed, refused where settings changed; the whole command behind -m long."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae

from megatron_flashi2v.config.errors import ConfigError, DataError, UserError

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "examples"))

from paradigms.driver import run_stages  # noqa: E402
from paradigms.files import read_recipe  # noqa: E402
from paradigms.footage import write_footage  # noqa: E402
from paradigms.ledger import LEDGER_FILE, Ledger, Task, start_over  # noqa: E402
from paradigms.sampling import read_samples  # noqa: E402
from paradigms.settings import PARADIGMS, SMOKE  # noqa: E402
from paradigms.stages import Run  # noqa: E402
from paradigms.training import train_flags  # noqa: E402
from paradigms.world import Board  # noqa: E402

TOY = dataclasses.replace(
    SMOKE, cells=3, frames=3, train_clips=8, test_clips={"trained": 8, "held": 8, "out": 8}, layers=1, hidden=16,
    ffn=24, heads=1, batch=4, iterations=(2,), train_flags=("--lr", "2e-3"), paradigms=("flashi2v",), solver_steps=2,
    classifier_clips=16, classifier_steps=4, resamples=10,
)  # fmt: skip


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that stages start find the package."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "examples"))))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def task(key: str, done: list[str], **settings: object) -> Task:
    return Task(stage="toy", key=key, settings=settings, run=lambda: done.append(key))


def test_the_ledger_keeps_what_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one, two = task("one", [], size=1), task("two", [], size=1)
    Ledger(folder).finish(one)
    assert Ledger(folder).missing([one, two]) == [two]
    with pytest.raises(ConfigError, match="one was made with size 1, not 2; give another --output, or --fresh"):
        Ledger(folder).missing([task("one", [], size=2)])
    with pytest.raises(ConfigError, match="one was made with size 1, not None"):
        Ledger(folder).missing([task("one", [])])
    cheap = dataclasses.replace(task("one", [], size=2), is_cheap=True)
    assert Ledger(folder).missing([cheap]) == [cheap]
    start_over(folder)
    assert not list(folder.iterdir())


@dataclasses.dataclass(frozen=True)
class Toys:
    """An experiment of one stage."""

    folder: Path
    toys: list[Task]
    stages: tuple[str, ...] = ("toy",)

    def tasks(self, stage: str) -> list[Task]:
        return self.toys

    def iterations_of(self, task: Task) -> None:
        return None


def program(folder: Path, key: str, words: str) -> Task:
    return Task(stage="toy", key=key, settings={}, command=(sys.executable, "-c", words), log=folder / f"{key}.log")


def recorded(folder: Path) -> set[str]:
    return set(json.loads((folder / LEDGER_FILE).read_text())["done"])


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_starts_nothing_more_and_loses_nothing(tmp_path: Path, jobs: int) -> None:
    """What is under way beside it ends, and is recorded."""
    folder = tmp_path / "run"
    long = program(folder, "long", "import time; time.sleep(2)")
    bad, after = program(folder, "bad", "print('why'); exit(3)"), program(folder, "after", "")
    toys = [bad, after] if jobs == 1 else [long, bad, after]
    with pytest.raises(UserError, match=r"bad: exit code 3: why \(all of it stands in .*bad.log\)"):
        run_stages(Toys(folder, toys), [], jobs=jobs)
    assert recorded(folder) == ({"long"} if jobs == 2 else set())
    assert not (folder / "after.log").exists()


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    toy = Task(stage="toy", key="toy", settings={}, command=("no-such-launcher",), log=tmp_path / "run" / "log")
    with pytest.raises(ConfigError, match="toy: no-such-launcher cannot be started"):
        run_stages(Toys(tmp_path / "run", [toy]), [], jobs=1)


def test_one_driver_at_a_time_and_sigterm_stops_what_it_started(tmp_path: Path, paths: None) -> None:
    """A second one would train into the same folders, and so would a training that outlives its driver."""
    folder = tmp_path / "run"
    child = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).write_text('saved'), os._exit(75)))\n"
        "print('ready', flush=True)\ntime.sleep(100)"
    )
    script = (
        "import sys; from pathlib import Path\n"
        "from paradigms.driver import run_stages; from paradigms.ledger import Task\n"
        "class Toys:\n"
        "    folder, stages = Path(sys.argv[1]), ('toy',)\n"
        "    def tasks(self, stage): return [Task(stage='toy', key='toy', settings={}, log=self.folder / 'log',\n"
        "        command=(sys.executable, '-c', sys.argv[2], str(self.folder / 'child')))]\n"
        "    def iterations_of(self, task): return None\n"
        "run_stages(Toys(), [], jobs=1)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, folder, child])
    try:
        wait_for(lambda: (folder / "log").exists() and "ready" in (folder / "log").read_text())
        with pytest.raises(ConfigError, match=r"another paradigms.sh is at work in it; wait, or stop it"):
            run_stages(Toys(folder, []), [], jobs=1)
        driver.terminate()
        assert driver.wait(60) == 128 + signal.SIGTERM
    finally:
        driver.kill()
    assert (folder / "child").read_text() == "saved"
    run_stages(Toys(folder, []), [], jobs=1)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for attempt in (Ledger, start_over):
        with pytest.raises(DataError, match="holds other files; give a new folder"):
            attempt(tmp_path)
    (tmp_path / LEDGER_FILE).write_text("{}")
    with pytest.raises(DataError, match="no record of paradigms.sh"):
        start_over(tmp_path)
    assert (tmp_path / "mine.txt").exists()


def test_paradigms_are_trained_alike() -> None:
    flags = {name: train_flags(SMOKE, Path("data"), name, 1, None) for name in PARADIGMS}
    for name, words in flags.items():
        assert words[words.index("--conditioning") + 1] == name
        words.remove(name)
    assert len({tuple(words) for words in flags.values()}) == 1


def test_stages_need_their_forerunners(tmp_path: Path) -> None:
    run = Run(settings=TOY, folder=tmp_path / "run")
    with pytest.raises(ConfigError, match="no such stage; there are world, classifier"):
        run_stages(run, ["trian"], jobs=1)
    with pytest.raises(ConfigError, match="stage world comes before and is not done; run it first"):
        run_stages(run, ["train"], jobs=1)
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.slow
def test_all_stages_and_again(tmp_path: Path, paths: None) -> None:
    """Two paradigms from one start, at toy size; a second call does nothing, and other settings are refused."""
    folder = tmp_path / "run"
    toy = dataclasses.replace(TOY, paradigms=("flashi2v", "inpainting"), start_iterations=2)
    run = Run(settings=toy, folder=folder)
    run_stages(run, ["world", "classifier"], jobs=1)
    run_stages(run, [], jobs=1)
    for paradigm in toy.paradigms:
        log = (folder / "logs" / f"train-{paradigm}-1.log").read_text()
        assert f"starting from the weights of {folder / 'start' / 'text_to_video-1'}" in log, log
    frames, errors = read_samples(run.samples_file("flashi2v", 1, 2, "out"))
    assert frames.shape == (8, 3, 12, 12, 3) and errors.shape == (8, 3)
    report = json.loads((folder / "report.json").read_text())
    assert {(row["paradigm"], row["iteration"]) for row in report["runs"]} == {
        (paradigm, 2) for paradigm in toy.paradigms
    }
    assert "says nothing: flashi2v cannot be judged" in " ".join(report["conclusions"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run_stages(run, [], jobs=1)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    # Lost samples of a stage that is not recorded are made again, equal.
    record = json.loads((folder / LEDGER_FILE).read_text())
    for key in [key for key in record["done"] if key.startswith("sample")]:
        del record["done"][key]
    (folder / LEDGER_FILE).write_text(json.dumps(record))
    run_stages(run, ["sample"], jobs=1)
    assert (read_samples(run.samples_file("flashi2v", 1, 2, "out"))[0] == frames).all()
    for name, value in {"hidden": 32, "solver_steps": 3, "classifier_steps": 5, "cells": 4}.items():
        changed = Run(settings=dataclasses.replace(toy, **{name: value}), folder=folder)
        with pytest.raises(ConfigError, match=f"was made with {name} "):
            run_stages(changed, [], jobs=1)
    run_stages(Run(settings=dataclasses.replace(toy, resamples=20), folder=folder), [], jobs=1)  # measured again
    assert json.loads((folder / "report.json").read_text())["settings"]["resamples"] == 20


def test_a_failed_run_is_told(tmp_path: Path, paths: None) -> None:
    run = Run(settings=dataclasses.replace(TOY, train_flags=("--lr", "fast")), folder=tmp_path / "run")
    run_stages(run, ["world", "classifier"], jobs=1)
    with pytest.raises(UserError, match=r"exit code 2: .*--lr.* \(all of it stands in .*flashi2v-1.log\)"):
        run_stages(run, ["train"], jobs=1)
    assert "train/flashi2v-1" not in recorded(tmp_path / "run")
    # An iteration measured that the trainings have not saved.
    run_stages(Run(settings=TOY, folder=tmp_path / "other"), ["world", "classifier"], jobs=1)
    Ledger(tmp_path / "other").finish(Run(settings=TOY, folder=tmp_path / "other").tasks("train")[0])
    with pytest.raises(ConfigError, match="was made with save_interval 2, not 1"):
        run_stages(Run(settings=dataclasses.replace(TOY, iterations=(1, 2)), folder=tmp_path / "other"), [], jobs=1)


def recipe(folder: Path) -> dict[str, object]:
    clips, models = folder / "clips", folder / "models"
    encoders = ["--vae", models / "vae", "--text-encoder", models / "text", "--tokenizer", models / "tokenizer"]
    size = ["--num-frames", "9", "--height", "48", "--width", "48", "--fps", "16", "--text-length", "8"]
    words = {
        "prepare_flags": [*encoders, *size, "--device", "cpu", "--min-pixels", "0"],
        "train_flags": [
            "--model", "tiny", "--num-layers", "1", "--hidden-size", "16", "--ffn-hidden-size", "24",
            "--num-attention-heads", "1", "--latent-channels", "4", "--text-dim", "16", "--text-length", "8",
            "--global-batch-size", "2", "--micro-batch-size", "2", "--device", "cpu",
        ],
        "sample_flags": [*encoders, "--num-steps", "2", "--guidance-scale", "1", "--device", "cpu"],
        "evaluate_flags": [
            "--features", f"latents:{models / 'vae'}", "--chunk-frames", "4", "--allow-few", "--device", "cpu",
        ],
    }  # fmt: skip
    return {
        "train": str(clips / "train"), **{name: str(clips / name) for name in ("trained", "held", "out")},
        "iterations": [2], "paradigms": ["inpainting"],
        **{key: [str(word) for word in row] for key, row in words.items()},
    }  # fmt: skip


def test_recipes_are_checked(tmp_path: Path) -> None:
    write_footage(tmp_path / "clips", Board(cells=3, frames=3), dict.fromkeys(("trained", "held", "out"), 1),
                  frames_per_step=4, enlarge=4)  # fmt: skip
    path, good = tmp_path / "recipe.yaml", recipe(tmp_path)
    path.write_text(yaml.safe_dump(good))
    assert read_recipe(path, tmp_path / "run").recipe.seeds == [1]
    for change, message in (
        ({"seed": [1]}, "no other keys"), ({"held": None}, "held is None; it must be a str"),
        ({"iterations": [2, 3]}, "rising multiples of the first"), ({"train_flags": "x"}, "it must be a list"),
        ({"iterations": ["2"]}, "different whole numbers from 1 on"), ({"seeds": [1, 1]}, "different whole numbers"),
        ({"launcher": ["no-such-launcher"]}, "no such program is on the PATH"),
        ({"paradigms": ["flashi2v", "flash"]}, "flash"),
        ({"train_flags": ["--lr", "fast"]}, "recipe.yaml: train: --lr"),
        ({"prepare_flags": ["--vea", "x"]}, "recipe.yaml: prepare: unknown flag --vea"),
        ({"evaluate_flags": ["--splits", "0"]}, "recipe.yaml: evaluate: --splits"),
        ({"sample_flags": ["--num-steps", "0"]}, "recipe.yaml: sample: --num-steps"),
    ):  # fmt: skip
        path.write_text(yaml.safe_dump({**good, **change}))
        with pytest.raises(ConfigError, match=message):
            read_recipe(path, tmp_path / "run")
    path.write_text(yaml.safe_dump(good))
    for suffix in (".mp4", ".txt"):
        shutil.copy(tmp_path / "clips" / "held" / f"held-0000{suffix}", tmp_path / "clips" / "held" / f"more{suffix}")
    with pytest.raises(DataError, match="sets have trained 1, held 2, out 1 videos"):
        read_recipe(path, tmp_path / "run")
    (tmp_path / "clips" / "held" / "more.mp4").unlink()
    (tmp_path / "clips" / "out" / "out-0000.txt").unlink()
    with pytest.raises(DataError, match="out-0000.mp4: has no caption"):
        read_recipe(path, tmp_path / "run")


def test_the_recipe_of_1_3b_has_the_keys() -> None:
    values = yaml.safe_load((ROOT / "examples" / "paradigms" / "1.3b.yaml").read_text())
    assert set(values) == {*recipe(Path()), "seeds", "launcher"}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_world_as_files(tmp_path: Path, paths: None) -> None:
    """mp4 files, and nothing but the commands: what --scale 1.3b does, at toy size."""
    make_tiny_vae(tmp_path / "models" / "vae", dim_mult=(1, 1, 1, 2), temporal=(False, True, True))
    make_tiny_text_encoder(tmp_path / "models" / "text")
    make_tiny_tokenizer(tmp_path / "models" / "tokenizer")
    write_footage(tmp_path / "clips", Board(cells=3, frames=3), {"train": 6, "trained": 4, "held": 4, "out": 4},
                  frames_per_step=4, enlarge=4)  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path)))
    command = [sys.executable, "-m", "paradigms", "--scale", "1.3b", "--recipe", path, "--output", tmp_path / "run"]
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (row,) = report["runs"]
    for name in ("trained", "held", "out"):
        assert len(row["sets"][name]["frechet"]["mean"]) == 2 and row["sets"][name]["videos"] == 4
        assert len(list((tmp_path / "run" / "sample" / "inpainting-1" / "0000002" / name).glob("*.mp4"))) == 4
    assert report["conclusions"][0].startswith("No classifier knows the laws")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_whole_smoke(tmp_path: Path, paths: None) -> None:
    """`bash examples/paradigms.sh --scale smoke`, but for the environment that it sets up."""
    command = [sys.executable, "-m", "paradigms", "--scale", "smoke", "--output", tmp_path / "run"]
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {row["paradigm"] for row in report["runs"]} == set(PARADIGMS) and len(report["runs"]) == 8
    assert min(report["classifier"].values()) > 0.8
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
