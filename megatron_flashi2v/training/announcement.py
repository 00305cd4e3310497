"""What a run is made of, told before it begins: lines of the log, and ``config.yaml`` under ``--save``."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import yaml

from flashi2v_kernels.registry import describe
from megatron_flashi2v.checkpoint.folders import has_checkpoint
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.files import atomic_write_text
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.training.holdings import held_by_all, holding_of

CONFIG_FILE = "config.yaml"

logger = logging.getLogger(__name__)


def announce(
    config: TrainConfig, stages: list[DiffusionTransformer], data: Blend, launch: LaunchEnvironment, device: Device,
    *, num_microbatches: int, starts_anew: bool,
) -> None:
    """Log devices, data, each rank's share and the kernels, and write config.yaml; all ranks call it.

    Args:
        config: flags and recipe.
        stages: this rank's.
        data: what is trained on.
        launch: this process's place.
        device: what it runs on.
        num_microbatches: of each replica and iteration.
        starts_anew: whether the run goes on from no checkpoint.
    """
    spec, groups = stages[0].spec, stages[0].spec.groups
    shapes = [shape[1:] for shape in data.latent_shapes]
    tokens = max(math.prod(stages[0].grid(shape)) for shape in shapes)
    held = holding_of(stages, shapes)
    logger.info("%s, launched by %s; %d processes", device.describe(), launch.launcher, launch.world_size)
    padded = held.tokens * groups.token_parts
    logger.info("data: %d samples of %d visual tokens%s from %s", len(data), tokens,
                f", padded to {padded}," if padded > tokens else "", data.name)
    for line in held_by_all(held, groups.pp.rank()):
        logger.info("%s", line)
    logger.info("%d microbatches of %d samples each iteration on each of %d replicas", num_microbatches,
                config.batch.micro_batch_size, groups.dp.size())
    for operator, implementation, why_not in describe(spec.kernels.chosen):
        logger.info("kernel %s: %s%s", operator, implementation, f" ({why_not})" if why_not else "")
    save = config.checkpoint.save
    if launch.rank == 0 and save is not None:
        if starts_anew and has_checkpoint(save):
            logger.warning("--save %s holds checkpoints of an earlier run, and this one starts anew beside them; "
                           "continue that run with --load %s, or choose another folder", save, save)
        write_config(config, save)


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the resolved flags as a recipe that ``--config`` reads back."""
    atomic_write_text(folder / CONFIG_FILE, yaml.safe_dump(flat_values(config), sort_keys=False))
