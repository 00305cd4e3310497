"""``flashi2v train``: pretraining on one process or many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_flashi2v.config.help import show
from megatron_flashi2v.config.layout import model_ranks
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_train
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.training.run import train

if TYPE_CHECKING:
    from megatron_flashi2v.training.watching.observer import Observer


def main(argv: Sequence[str]) -> int:
    """Train, or with ``--dry-run`` print the plan; the exit code."""
    config = parse(
        TrainConfig, argv, prog=TrainConfig.command, description="Pretrain a FlashI2V diffusion transformer."
    )
    if config.runtime.dry_run:
        dry_run(config)
        return 0
    finished = train(config, observers_of(config)).iteration >= config.batch.train_iters
    return 0 if finished else config.checkpoint.exit_code_when_unfinished


def observers_of(config: TrainConfig) -> list[Observer]:
    """Observers that flags ask for and that training does not know."""
    if config.watch.evaluation_interval is None:
        return []
    from megatron_flashi2v.evaluation.in_training import EvaluationInTraining  # imports torch

    return [EvaluationInTraining()]


def dry_run(config: TrainConfig) -> None:
    """Print the plan of a run, on rank 0."""
    launch, model = detect_launch(os.environ), resolve_model(config.model)
    world_size = config.runtime.world_size or max(launch.world_size, model_ranks(config.parallel))
    check_train(config, model, world_size)
    if launch.rank == 0:
        with logging_to_stderr():
            from megatron_flashi2v.planning.dry_run import dry_run_report

            show(dry_run_report(config, model, world_size))
