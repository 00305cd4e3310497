"""A run's folder: the same command goes on, and nothing of another run is cut or replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.layouts import metrics
from helpers.synthetic_data import write_synthetic
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

from megatron_flashi2v.checkpoint.manifest import write_manifest
from megatron_flashi2v.training.watching.observer import Observer

Train = Callable[..., int]


def iterations(save: Path) -> list[int]:
    """Those of metrics.jsonl."""
    return [row["iteration"] for row in metrics(save)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_goes_on(train: Train, tmp_path: Path) -> None:
    for _ in range(2):
        assert train("--save", tmp_path / "parts", "--exit-interval", 2) == 0
    assert train("--save", tmp_path / "straight") == 0
    assert iterations(tmp_path / "parts") == [1, 2, 3, 4]
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("parts", "straight")]
    assert losses[0] == losses[1]


def test_a_command_with_load_goes_on_in_its_own_folder(train: Train, tmp_path: Path) -> None:
    """The second start must not begin at --load again; another start's folder is refused."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train("--save", first, "--train-iters", 1) == 0
    for _ in range(2):
        assert train("--save", second, "--load", first, "--exit-interval", 2) == 0
    assert iterations(second) == [2, 3, 4]
    before = contents(second)
    other = tmp_path / "other"
    assert train("--save", other, "--train-iters", 2) == 0
    assert train("--save", second, "--load", other) == 1
    assert contents(second) == before


@pytest.mark.parametrize("what", ["data", "model"])
def test_another_run_is_refused_with_what_differs(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    save = tmp_path / "run"
    assert train("--save", save, "--train-iters", 1) == 0
    before = contents(save)
    if what == "data":
        other = write_synthetic(tmp_path / "data", 7, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=4)
        flags, told = ("--data-path", other), "samples is 6 there and 7 here"
    else:
        flags, told = ("--phi-kernel", "3x3x3"), "phi_kernel_size is [1, 3, 3] in the checkpoint"
    capfd.readouterr()
    assert train("--save", save, *flags) == 1
    error = capfd.readouterr().err
    assert told in error and "--fresh" in error
    assert contents(save) == before


@pytest.mark.parametrize("keeps", ["tracker", "nothing"])
def test_metrics_without_a_checkpoint_are_refused(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str], keeps: str
) -> None:
    assert train("--save", tmp_path, "--train-iters", 2) == 0
    shutil.rmtree(tmp_path / "iter_0000002")
    if keeps == "nothing":
        (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    before = contents(tmp_path)
    assert train("--save", tmp_path, "--train-iters", 2) == 1
    assert "metrics.jsonl of a run of 2 iterations" in capfd.readouterr().err
    assert contents(tmp_path) == before


class Dies(Observer):
    """Ends a run as a kill would, before its first checkpoint."""

    def after_iteration(self, row: Any) -> None:
        if row["iteration"] == 2:
            raise RuntimeError("planted")


def test_a_run_killed_before_its_first_checkpoint_starts_again(train: Train, tmp_path: Path) -> None:
    """The same command does; with other flags the folder is another run's."""
    with pytest.raises(RuntimeError, match="planted"):
        train("--save", tmp_path, observers=[Dies()])
    assert train("--save", tmp_path, "--seed", 6) == 1
    assert train("--save", tmp_path) == 0
    assert iterations(tmp_path) == [1, 2, 3, 4]


def test_fresh_sets_the_old_run_aside_whole(train: Train, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert train("--save", save, "--train-iters", 2) == 0
    (save / "notes.txt").write_text("mine")
    before = contents(save)
    assert train("--save", save, "--fresh", "--train-iters", 1, "--seed", 9) == 0
    (aside,) = tmp_path.glob("run.before-*")
    assert contents(aside) == before and iterations(save) == [1]
    assert train("--fresh") == 2
    for inside in (save, save / "iter_0000001"):
        assert train("--save", save, "--load", inside, "--fresh") == 2
    (tmp_path / "empty").mkdir()
    for load in ("typo", "empty"):  # refused before the run is set aside
        assert train("--save", save, "--load", tmp_path / load, "--fresh") == 1
    assert list(tmp_path.glob("run.before-*")) == [aside] and iterations(save) == [1]


def test_load_must_hold_a_checkpoint(train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert train("--save", tmp_path / "run", "--load", tmp_path / "typo") == 1
    assert "typo does not exist" in capfd.readouterr().err
    assert train("--save", tmp_path / "run", "--load", tmp_path / "empty") == 1
    assert "empty holds no checkpoint" in capfd.readouterr().err
    assert train("--save", tmp_path / "run", "--load", tmp_path / "run", "--train-iters", 1) == 0
    assert train("--save", tmp_path / "run", "--load", tmp_path / "empty") == 1
    assert "empty holds no checkpoint" in capfd.readouterr().err


def test_a_recipe_in_the_folder_keeps_its_comments(
    train: Train, run_command: Train, tmp_path: Path
) -> None:
    assert train("--save", tmp_path / "template", "--train-iters", 1) == 0
    values = yaml.safe_load((tmp_path / "template" / "config.yaml").read_text())
    save = tmp_path / "run"
    save.mkdir()
    mine = "# why this rate: see my notes\n" + yaml.safe_dump(values | {"save": str(save)})
    (save / "config.yaml").write_text(mine)
    assert run_command("--config", save / "config.yaml") == 0
    assert (save / "config.yaml").read_text() == mine
    assert yaml.safe_load((save / "config.resolved.yaml").read_text())["train_iters"] == 1
    # A short one without comments has the form that version 0.1 gave its own.
    plain = tmp_path / "plain" / "config.yaml"
    plain.parent.mkdir()
    plain.write_text("model: tiny\n")
    assert train("--save", plain.parent, "--train-iters", 1) == 0
    assert plain.read_text() == "model: tiny\n"
    # Ours is written anew at each start, also where version 0.1 left it without the first line.
    ours = tmp_path / "template" / "config.yaml"
    ours.write_text(yaml.safe_dump(values, sort_keys=False))
    assert train("--save", tmp_path / "template", "--train-iters", 2) == 0
    assert yaml.safe_load(ours.read_text())["train_iters"] == 2


@pytest.mark.parametrize("flags, told", [
    (("--lr", 2e-2), "--lr is 0.02 and was 0.01"),
    (("--lr-decay-style", "cosine"), "--lr-decay-style is cosine and was constant"),
    (("--global-batch-size", 2), "--global-batch-size is 2 and was 4"),
    (("--weight-decay", 0.1), "--weight-decay is 0.1 and was 0.01"),
])  # fmt: skip
def test_the_schedule_under_way_is_not_bent_unasked(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[object, ...], told: str
) -> None:
    assert train("--save", tmp_path, "--train-iters", 2) == 0
    capfd.readouterr()
    assert train("--save", tmp_path, "--train-iters", 3, *flags) == 2
    error = capfd.readouterr().err
    assert told in error and "--override-opt-param-scheduler" in error
    assert train("--save", tmp_path, "--train-iters", 3, *flags, "--override-opt-param-scheduler") == 0
    assert iterations(tmp_path) == [1, 2, 3]


def test_the_end_of_a_decay_is_part_of_the_schedule(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """12 -> 24 iterations of a cosine would raise the rate 17-fold; with a constant rate only the end moves."""
    cosine = ("--lr-decay-style", "cosine")
    assert train("--save", tmp_path, *cosine, "--exit-interval", 2) == 0
    assert train("--save", tmp_path, *cosine, "--train-iters", 8) == 2
    assert "--train-iters is 8 and was 4" in capfd.readouterr().err
    assert train("--save", tmp_path, *cosine, "--lr-decay-iters", 4, "--train-iters", 8) == 2


def test_what_differs_is_listed_once(train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train("--save", tmp_path, "--train-iters", 2) == 0
    capfd.readouterr()
    flags = ("--train-iters", 3, "--text-drop-probability", 0.5, "--log-interval", 7)
    assert train("--save", tmp_path, *flags) == 0
    told = capfd.readouterr().err
    assert told.count("text_drop_probability") == 1 and "0.1" in told and "log_interval" not in told


def test_a_run_of_version_0_1_keeps_its_schedule_too(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints hold no flags; its config.yaml does."""
    assert train("--save", tmp_path, "--train-iters", 2) == 0
    for path in tmp_path.glob("iter_*/state.json"):
        state = json.loads(path.read_text())
        del state["config"]
        path.write_text(json.dumps(state))
        write_manifest(path.parent, ["model_config.json", "state.json"])
    assert train("--save", tmp_path, "--train-iters", 3, "--lr", 2e-2) == 2
    assert "--lr is 0.02 and was 0.01" in capfd.readouterr().err
    assert train("--save", tmp_path, "--train-iters", 3) == 0


class Interrupts(Observer):
    """Presses Ctrl-C during iteration 2, once or twice."""

    def __init__(self, times: int) -> None:
        self.times = times

    def gradients_ready(self, state: Any, totals: Any) -> None:
        if state.iteration == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_says_how_to_go_on(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("--save", tmp_path, observers=[Interrupts(1)]) == 0
    left = iterations(tmp_path)[-1]
    assert left < 4 and (tmp_path / f"iter_{left:07d}").is_dir()
    told = capfd.readouterr().err
    assert "SIGINT was received" in told and f"goes on from {tmp_path / f'iter_{left:07d}'}" in told
    assert train("--save", tmp_path) == 0
    assert iterations(tmp_path) == [1, 2, 3, 4]


def test_a_second_ctrl_c_does_not_wait(train: Train, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("--save", tmp_path, observers=[Interrupts(2)])
    assert not list(tmp_path.glob("iter_*"))


def test_an_unfinished_run_ends_with_the_chosen_code(train: Train, tmp_path: Path) -> None:
    flags = ("--save", tmp_path, "--exit-code-when-unfinished", 77)
    assert train(*flags, "--exit-interval", 2) == 77
    assert train(*flags) == 0
    assert train(*flags) == 0  # nothing is left to do


def test_a_run_without_a_folder_says_so(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    assert train("--train-iters", 1) == 0
    assert capfd.readouterr().err.count("neither checkpoints nor metrics") == 1
