"""Two ranks that write beside training meet only between two iterations, whichever of them is slow or fails."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.checkpoints import ODD, read_full, tensors_of
from helpers.ranks import run_ranks

from megatron_flashi2v.checkpoint import saving
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.index import Index
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.storage import TensorPiece, keys
from megatron_flashi2v.config.train import CheckpointArguments
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.distributed import shutdown
from megatron_flashi2v.training.saver import CheckpointSaver

SLOW_UNTIL = 5
"""Iteration in which the slow rank's disk answers."""


class Ranks:
    """This rank's part of a run that saves in iteration 1, trains until that is published, and saves again."""

    def __init__(self, rank: int, save: Path) -> None:
        self.rank, self.iteration = rank, 0
        self.values = {name: torch.zeros(shape.shape) for name, shape in tensors_of(ODD).items()}
        arguments = CheckpointArguments(save=save, async_save=True)
        self.saver = CheckpointSaver(arguments, ODD, Peers(rank, 2), CpuDevice())
        self.tick = threading.Condition()

    def pieces(self) -> list[TensorPiece]:
        whole = [TensorPiece.whole(f"model.{name}", value) for name, value in self.values.items()]
        return whole[self.rank :: 2]

    def run(self, first: Path, fails: bool) -> None:
        published = False
        while not published and self.iteration < (3 * SLOW_UNTIL if fails else 2000):
            with self.tick:
                self.iteration += 1
                self.tick.notify_all()
            counts = torch.tensor([self.saver.working(), int(first.exists())])
            dist.all_reduce(counts)
            published = counts[1] == 2
            assert not published or (self.iteration > SLOW_UNTIL and not fails)
            for value in self.values.values():
                value += 1.0
            self.saver.advance(int(counts[0]))
            if self.iteration == 1:
                self.saver.save(1, self.pieces(), {}, last=False)
            if self.iteration > SLOW_UNTIL:
                time.sleep(0.05)
        assert published != fails
        self.saver.save(self.iteration, self.pieces(), {})

    def wait_for(self, iteration: int) -> None:
        with self.tick:
            assert self.tick.wait_for(lambda: self.iteration >= iteration, 100)


def writer(original: Callable[..., Index], ranks: Ranks, fails: bool) -> Callable[..., Index]:
    """What writes a rank's file on a slow disk, or on one that is full besides."""

    def write(*arguments: object, **keywords: object) -> Index:
        if threading.current_thread() is not threading.main_thread():
            ranks.wait_for(SLOW_UNTIL)
            if fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tensors")
        return original(*arguments, **keywords)

    return write


CASES = [(slow, fails) for slow in (0, 1) for fails in (False, True)]


def train(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=3))
    original = saving.write_rank_file
    for slow, fails in CASES:
        folder = root / f"{slow}-{fails}"
        folder.mkdir(exist_ok=True)
        ranks = Ranks(rank, folder / "run")
        saving.write_rank_file = writer(original, ranks, fails) if rank == slow else original
        with open(folder / f"log-{rank}.txt", "w", encoding="utf-8") as log:
            logging.basicConfig(stream=log, level=logging.INFO, force=True)
            ranks.run(folder / "run" / "iter_0000001", fails)
            logging.basicConfig(force=True)
    shutdown()


def test_a_rank_that_is_slow_or_fails(tmp_path: Path) -> None:
    run_ranks(train, 2, tmp_path, tmp_path)
    for slow, fails in CASES:
        folder = tmp_path / f"{slow}-{fails}"
        require_checkpoints(folder / "run", first=not fails)
        for rank in range(2):
            log = (folder / f"log-{rank}.txt").read_text()
            assert log.count("the run goes on") == fails and (f"rank {slow} of 2; 1 failed" in log) == fails


def require_checkpoints(save: Path, first: bool) -> None:
    """Those of iteration 1, or not, and of the last one are there, each with its iteration's weights."""
    folders = sorted(path.name for path in save.iterdir() if path.is_dir())
    assert len(folders) == 1 + first and ("iter_0000001" in folders) == first
    for name in folders:
        folder = find_checkpoint(save, int(name.removeprefix("iter_")))
        assert folder is not None and folder.name == name
        values = {value for key in keys(folder) for value in read_full(folder, key).unique().tolist()}
        assert values == {int(name.removeprefix("iter_"))}
