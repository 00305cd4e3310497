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
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.distributed import init_distributed, shutdown
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.runtime.logging import setup_logging
from megatron_flashi2v.runtime.redirect import megatron_on

if TYPE_CHECKING:
    from megatron_flashi2v.training.batch import MicrobatchSource
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
    model = resolve_model(config.model)
    launch = detect_launch(os.environ)
    check_train(config, model, launch.world_size)
    setup_logging(launch.rank)
    device = resolve_device(config.runtime.device, launch.local_rank)
    init_distributed(launch, device)
    from megatron_flashi2v.checkpoint.peers import Peers
    from megatron_flashi2v.parallel.groups import destroy_groups
    from megatron_flashi2v.training.saver import CheckpointSaver
    from megatron_flashi2v.training.trainer import Trainer

    with megatron_on(device):
        trainer = Trainer(config, model, launch, device)
        for chunk in trainer.models:
            chunk.train()
        source = trainer.make_source()
        source.end = None
        trainer.bad_samples = trainer.make_bad_sample_ledger(source)
        report: dict[str, Any] = {"iteration_s": [_seconds(trainer.run_iteration, source) for _ in range(5)][1:]}
        for name, beside in (("at_once", False), ("beside", True)):
            arguments = dataclasses.replace(
                config.checkpoint, async_save=beside, save_interval=1, keep_last=1, keep_every=None
            )
            peers = Peers(launch.rank, launch.world_size)
            trainer.saver = CheckpointSaver(arguments, trainer.model_config, peers, device)
            trainer.saver.reserve(trainer.pieces)  # as the first iteration of a run does
            for _ in range(10):
                trainer.run_iteration(source)
            report[name] = [measure(trainer, source) for _ in range(SAVES)]
        source.abandon()
        destroy_groups()
    shutdown()
    if launch.rank == 0:
        shutil.rmtree(folder)
        sys.stdout.write(json.dumps(report, indent=1) + "\n")


def measure(trainer: Trainer, source: MicrobatchSource) -> dict[str, Any]:
    """Save once, train until the checkpoint is published, and measure both."""
    assert trainer.config.checkpoint.save is not None
    trainer.run_iteration(source)
    start = time.perf_counter()
    blocked = _seconds(lambda: trainer.save(last=False))
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
        iterations.append(_seconds(trainer.run_iteration, source))
    del trainer.saver.advance  # type: ignore[method-assign]
    size = _size(trainer.config.checkpoint.save / f"iter_{trainer.iteration - len(iterations):07d}")
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
