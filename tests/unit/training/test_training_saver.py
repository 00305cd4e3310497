"""Checkpoints that are written beside training: the same ones, whatever the disk does meanwhile."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.layouts import metrics

from megatron_flashi2v.checkpoint import saving
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.host_copies import HostCopies
from megatron_flashi2v.config.errors import WriteError
from megatron_flashi2v.training import saver as saver_module
from megatron_flashi2v.training.bad_samples import BadSampleLedger
from megatron_flashi2v.training.saver import CheckpointSaver
from megatron_flashi2v.training.step import TrainingStep

Train = Callable[..., int]
Update = Callable[[TrainingStep], float]


def saved(save: Path) -> list[int]:
    """Iterations whose checkpoints are published; nothing else may be left."""
    assert not list(save.glob(".iter_*"))
    return sorted(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*"))


def files(save: Path) -> dict[str, bytes]:
    """What all checkpoints of a run consist of."""
    return {str(path.relative_to(save)): path.read_bytes() for path in save.glob("iter_*/*")}


def before_writing(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Let a thread that writes a rank's file do something first."""
    original = saving.write_rank_file

    def write(*arguments: object, **keywords: object) -> object:
        if threading.current_thread() is not threading.main_thread():
            action()
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_rank_file", write)


def in_update(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], object]) -> None:
    """Do something after each update of the weights, counted from 1."""
    original, count = TrainingStep.apply, [0]

    def apply(step: TrainingStep, grad_norm: float) -> None:
        original(step, grad_norm)
        count[0] += 1
        action(count[0])

    monkeypatch.setattr(TrainingStep, "apply", apply)


def saving_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "save"]


@pytest.mark.parametrize("flags", [
    (), ("--bf16", "--use-distributed-optimizer", "--ema-decay", 0.5, "--clip-grad-method", "adaptive"),
], ids=["fp32", "bf16"])
def test_the_same_files_though_training_goes_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...]
) -> None:
    """Each file is written when the weights were updated once more."""
    flags = ("--save-interval", 2, "--train-iters", 5, *flags)
    assert train("--save", tmp_path / "once", *flags) == 0
    updated = threading.Event()
    before_writing(monkeypatch, lambda: updated.clear() or updated.wait(60) or pytest.fail("training waits"))
    in_update(monkeypatch, lambda number: updated.set())
    assert train("--save", tmp_path / "beside", "--async-save", *flags) == 0
    assert saved(tmp_path / "beside") == [2, 4, 5]
    assert files(tmp_path / "beside") == files(tmp_path / "once")
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("beside", "once")]
    assert losses[0] == losses[1]


def test_a_save_that_is_due_waits_for_the_one_under_way(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saver_module, "WAIT_WORTH_TELLING_S", 0.2)
    original, waits = CheckpointSaver.finish, threading.Event()

    def finish(saver: CheckpointSaver) -> None:
        waits.set()
        original(saver)

    monkeypatch.setattr(CheckpointSaver, "finish", finish)
    before_writing(monkeypatch, lambda: waits.clear() or waits.wait(60) and time.sleep(0.3))
    assert train("--save", tmp_path / "beside", "--save-interval", 1, "--async-save", "--keep-last", 2) == 0
    assert saved(tmp_path / "beside") == [3, 4]
    assert caplog.text.count("--save-interval is too short") == 3
    assert caplog.text.count("training was blocked for") == 4
    monkeypatch.undo()
    assert train("--save", tmp_path / "once", "--save-interval", 1, "--keep-last", 2) == 0
    assert files(tmp_path / "beside") == files(tmp_path / "once")


@pytest.mark.parametrize("ends_by", ["signal", "gradient"])
def test_what_is_under_way_is_published_before_the_run_ends(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by: str
) -> None:
    monkeypatch.setattr(saver_module, "ABANDON_S", 0.0)
    before_writing(monkeypatch, lambda: time.sleep(1.0))
    if ends_by == "signal":
        in_update(monkeypatch, lambda number: number == 2 and os.kill(os.getpid(), signal.SIGTERM))
        code, expected = 0, [2, 3]
    else:
        norms = iter([1.0, 1.0, float("nan")])
        agree = TrainingStep.agree
        monkeypatch.setattr(
            TrainingStep, "agree", lambda *given: dataclasses.replace(agree(*given), grad_norm=next(norms))
        )
        code, expected = 1, [2]
    flags = ("--save-interval", 2, "--async-save", "--max-skipped-updates", 0)
    assert train("--save", tmp_path, *flags) == code
    assert saved(tmp_path) == expected


def test_a_rank_that_fails_alone_meets_no_other(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's disk is full when a bad sample is to be recorded: the others train on, and would wait for it."""

    def settle(ledger: BadSampleLedger, own: object, counted: int) -> None:
        if list(tmp_path.glob(".iter_*")):
            raise WriteError("the disk is full")

    monkeypatch.setattr(BadSampleLedger, "settle", settle)
    monkeypatch.setattr(saver_module, "ABANDON_S", 0.0)
    before_writing(monkeypatch, lambda: time.sleep(1.0))
    assert train("--save", tmp_path, "--save-interval", 2, "--async-save") == 1
    assert not list(tmp_path.glob("iter_*")) and len(metrics(tmp_path)) == 2


def test_a_run_that_fails_neither_hangs_nor_publishes(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hangs, and training fails meanwhile; the relaunch is the uninterrupted run."""
    assert train("--save", tmp_path / "straight", "--save-interval", 1) == 0
    save, back = tmp_path / "failed", threading.Event()
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "ABANDON_S", 0.1)
        before_writing(patch, lambda: calls.append(1) or len(calls) == 1 or back.wait(60))

        def fail(number: int) -> None:
            if number == 3:
                raise RuntimeError("connection closed by peer")

        in_update(patch, fail)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="closed by peer"):
            train("--save", save, "--save-interval", 1, "--async-save")
        assert time.monotonic() - start < 50
        back.set()  # now it goes on, but is not wanted any more
        saving_threads()[0].join(60)
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000001"]
    assert train("--save", save, "--load", save, "--save-interval", 1, "--async-save") == 0
    assert files(save) == files(tmp_path / "straight")
    assert [row["loss"] for row in metrics(save)] == [row["loss"] for row in metrics(tmp_path / "straight")]


def test_memory_is_reserved_before_the_first_save(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    original = HostCopies._new_block

    def new_block(copies: HostCopies, size: int) -> torch.Tensor:
        made.append(threading.current_thread().name)
        return original(copies, size)

    monkeypatch.setattr(HostCopies, "_new_block", new_block)
    assert train("--save", tmp_path, "--save-interval", 2, "--async-save") == 0
    assert made == ["reserve"] and saved(tmp_path) == [2, 4]
    assert train("--save", tmp_path / "end", "--async-save") == 0 == train("--save", tmp_path / "at-once")
    assert made == ["reserve"]


def test_a_disk_that_is_full_when_it_is_published(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = saving.write_tracker

    def write(root: Path, iteration: int) -> None:
        if iteration == 2:
            assert threading.current_thread() is not threading.main_thread()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(root, iteration)

    monkeypatch.setattr(saving, "write_tracker", write)
    in_update(monkeypatch, lambda number: [thread.join(60) for thread in saving_threads()])
    assert train("--save", tmp_path, "--save-interval", 2, "--train-iters", 6, "--async-save") == 0
    assert saved(tmp_path) == [4, 6] and find_checkpoint(tmp_path) == tmp_path / "iter_0000006"
    assert caplog.text.count("the run goes on") == 1 and "No space left" in caplog.text
