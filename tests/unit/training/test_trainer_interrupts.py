"""Runs that are asked to stop, or whose disk is full, keep what they have done."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.layouts import metrics

from megatron_flashi2v.checkpoint import tensor_file
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.config.errors import UserError, WriteError
from megatron_flashi2v.training import interrupts as interrupts_module
from megatron_flashi2v.training import metrics as metrics_module
from megatron_flashi2v.training.interrupts import Interrupts
from megatron_flashi2v.training.state import TrainState
from megatron_flashi2v.training.watching.observer import Observer

Train = Callable[..., int]


def saved(save: Path) -> list[str]:
    return sorted(path.name for path in save.glob("iter_*"))


class InIteration(Observer):
    """Does something when an iteration, counted from 1, has begun."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self.number, self.action = number, action

    def before_iteration(self, state: TrainState) -> None:
        if state.iteration + 1 == self.number:
            self.action()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(train: Train, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train("--save", straight) == 0
    signalled = InIteration(2, lambda: os.kill(os.getpid(), number))
    assert train("--save", halves, observers=[signalled]) == 0
    assert saved(halves) == ["iter_0000002"] and len(metrics(halves)) == 2
    assert signal.getsignal(number) is before
    assert train("--save", halves, "--load", halves) == 0
    assert [row["loss"] for row in metrics(halves)] == [row["loss"] for row in metrics(straight)]


def test_a_run_leaves_when_its_time_is_over(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Clock:
        def monotonic(self) -> float:
            return now[0]

    monkeypatch.setattr(interrupts_module, "time", Clock())
    late = InIteration(3, lambda: now.append(now.pop() + 30.5))
    assert train("--save", tmp_path, "--exit-duration-minutes", 0.5, observers=[late]) == 0
    assert saved(tmp_path) == ["iter_0000003"]


def test_one_rank_is_enough() -> None:
    interrupts = Interrupts(None)
    assert interrupts.counts() == (0, 0, 0, 0)
    interrupts.settle((0, 0, 0, 0))
    assert interrupts.agreed is None
    interrupts.settle((0, 1, 0, 0))
    assert interrupts.agreed == "SIGUSR1 was received"
    late = Interrupts(1e-9)
    time.sleep(0.001)
    assert late.counts() == (0, 0, 0, 1)
    late.settle((0, 0, 0, 3))
    assert "exit-duration-minutes" in (late.agreed or "")


@pytest.mark.parametrize(("signalled", "raised", "expected"), [
    (True, RuntimeError("connection closed by peer"), SystemExit),
    (True, UserError("the disk is full"), UserError),
    (False, RuntimeError("connection closed by peer"), RuntimeError),
])
def test_a_rank_that_cannot_go_on_obeys_the_launcher(
    signalled: bool, raised: Exception, expected: type[BaseException]
) -> None:
    """It must not wait for another SIGTERM; but its own error is told."""
    with pytest.raises(expected), Interrupts(None):
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        raise raised


def fill_disk(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Let the writing of tensors fail with a full disk, the first time, the second time ..."""
    original, calls = tensor_file.os.fsync, []

    class Os:
        def fsync(self, descriptor: int) -> None:
            calls.append(0)
            if fails(len(calls)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

    monkeypatch.setattr(tensor_file, "os", Os())


BESIDE = pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["at-once", "beside"])


@BESIDE
def test_a_run_outlives_a_full_disk(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    flags: tuple[str, ...],
) -> None:
    fill_disk(monkeypatch, lambda call: call in (2, 3))
    assert train("--save", tmp_path, "--save-interval", 1, "--keep-last", 1, *flags) == 0
    assert saved(tmp_path) == ["iter_0000004"] and find_checkpoint(tmp_path) == tmp_path / "iter_0000004"
    assert caplog.text.count("the run goes on") == 2 and "disk is full" in caplog.text
    assert len(metrics(tmp_path)) == 4


@BESIDE
def test_a_run_that_cannot_save_its_end_fails(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    fill_disk(monkeypatch, lambda call: call == 2)
    assert train("--save", tmp_path, "--save-interval", 2, *flags) == 1
    assert "disk is full" in capsys.readouterr().err
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000002"


def test_metrics_wait_for_a_full_disk(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = metrics_module.append_jsonl, []

    def append(path: Path, row: dict) -> None:
        calls.append(row)
        if len(calls) in (2, 3):
            raise WriteError(f"{path}: the disk is full")
        original(path, row)

    monkeypatch.setattr(metrics_module, "append_jsonl", append)
    assert train("--save", tmp_path) == 0
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
