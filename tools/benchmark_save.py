"""Measures how long saving blocks training: at once, and beside training (``--async-save``).

    python tools/benchmark_save.py --save FOLDER --data-path runs/quickstart/data [any flags of `flashi2v train`]

Alone or under torchrun, trains and saves a few checkpoints both ways, keeps the newest one (so that the folder needs
room for two), and prints seconds and sizes as JSON. The folder must not exist, and is deleted at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_train
from megatron_flashi2v.config.train import CheckpointArguments, TrainConfig
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.runtime.logging import logging_to_stderr

if TYPE_CHECKING:
    from megatron_flashi2v.training.trainer import Trainer

SAVES = 3
MOST_ITERATIONS = 1000
"""Limit for a checkpoint to appear."""


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    config = parse(TrainConfig, argv, prog="benchmark_save", description="Measure how long saving blocks training.")
    folder = config.checkpoint.save
    if folder is None or folder.exists():
        sys.exit("benchmark_save: --save must name a folder that does not exist")
    from megatron_flashi2v.training.run import entered_run

    model, launch = resolve_model(config.model), detect_launch(os.environ)
    check_train(config, model, launch.world_size)
    with logging_to_stderr(launch.rank), entered_run(config, model, launch) as trainer:
        report = compare(trainer, config.checkpoint)
    if launch.rank == 0:
        shutil.rmtree(folder)
        sys.stdout.write(json.dumps(report, indent=1) + "\n")


def compare(trainer: Trainer, checkpoint: CheckpointArguments) -> dict[str, Any]:
    """Seconds of iterations without a save, and of saves in either way."""
    import torch.distributed

    from megatron_flashi2v.checkpoint.peers import Peers
    from megatron_flashi2v.training.checkpoints import RunCheckpoints
    from megatron_flashi2v.training.saver import CheckpointSaver

    for model in trainer.state.models:
        model.train()
    trainer.source.end = None
    report: dict[str, Any] = {"iteration_s": [_seconds(trainer.run_iteration) for _ in range(5)][1:]}
    for name, beside in (("at_once", False), ("beside", True)):
        arguments = dataclasses.replace(
            checkpoint, async_save=beside, save_interval=1, keep_last=1, keep_every=None
        )
        peers = Peers(torch.distributed.get_rank(), torch.distributed.get_world_size())
        trainer.saver = CheckpointSaver(arguments, trainer.state.spec.config, peers, trainer.device)
        trainer.checkpoints = RunCheckpoints(arguments, trainer.state, trainer.saver, trainer.hang_watch)
        trainer.saver.reserve(trainer.state.pieces)  # as the first iteration of a run does
        for _ in range(10):
            trainer.run_iteration()
        assert checkpoint.save is not None
        report[name] = [measure(trainer, checkpoint.save) for _ in range(SAVES)]
    trainer.source.abandon()
    return report


def measure(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Save once, train until the checkpoint is published, and measure both."""
    from megatron_flashi2v.checkpoint.folders import iteration_folder

    trainer.run_iteration()
    saved_at = trainer.state.iteration
    start = time.perf_counter()
    blocked = _seconds(lambda: trainer.checkpoints.save(last=False))
    published, iterations = time.perf_counter() - start, []
    advance = trainer.saver.advance

    def timed_advance(working: int) -> None:
        nonlocal blocked, published
        under_way = trainer.saver.is_saving
        blocked += _seconds(advance, working)
        if under_way and not trainer.saver.is_saving:
            published = time.perf_counter() - start

    trainer.saver.advance = timed_advance  # type: ignore[method-assign]
    while trainer.saver.is_saving and len(iterations) < MOST_ITERATIONS:
        iterations.append(_seconds(trainer.run_iteration))
    del trainer.saver.advance  # type: ignore[method-assign]
    size = _size(folder / iteration_folder(saved_at))
    return {
        "gigabytes": size / 1e9, "blocked_s": blocked, "blocked_s_per_gigabyte": blocked / size * 1e9,
        "published_after_s": published, "gigabytes_per_s": size / 1e9 / published, "iterations_meanwhile_s": iterations,
    }  # fmt: skip


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _seconds(action: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
