"""Tells what a run is made of before it begins: in the log, and as ``config.yaml`` under ``--save``."""

from __future__ import annotations

import logging
import math

from flashi2v_kernels.registry import describe
from megatron_flashi2v.config.layout import sharding_ranks
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.models.kernel_choice import default_kernels
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.training.holdings import held_by_all, holding_of
from megatron_flashi2v.training.partial import training_of
from megatron_flashi2v.training.run_folder import write_config
from megatron_flashi2v.training.state import TrainState

logger = logging.getLogger(__name__)


def announce(
    config: TrainConfig, state: TrainState, data: Blend, launch: LaunchEnvironment, device: Device,
    *, num_microbatches: int,
) -> None:
    """Log devices, data, each rank's share and the kernels, and write config.yaml; all ranks call it.

    Args:
        config: flags and recipe.
        state: this rank's.
        data: what is trained on.
        launch: this process's place.
        device: what it runs on.
        num_microbatches: of each replica and iteration.
    """
    stages, spec, groups = state.stages, state.spec, state.spec.groups
    shapes = [shape[1:] for shape in data.latent_shapes]
    tokens = max(math.prod(stages[0].grid(shape)) for shape in shapes)
    held = holding_of(stages, state.parameter_shapes(), shapes)
    sharing = sharding_ranks(config.parallel, launch.world_size) if state.gathers_blocks else 1
    logger.info("%s, launched by %s; %d processes", device.describe(), launch.launcher, launch.world_size)
    padded = held.tokens * groups.token_parts
    logger.info("data: %d samples of %d visual tokens%s from %s", len(data), tokens,
                f", padded to {padded}," if padded > tokens else "", data.name)
    if state.adapter is not None:
        logger.info("%s", training_of(state.adapter, spec.config))
    for line in held_by_all(held, groups.pp.rank(), sharing):
        logger.info("%s", line)
    logger.info("%d microbatches of %d samples each iteration on each of %d replicas", num_microbatches,
                config.batch.micro_batch_size, groups.dp.size())
    default = default_kernels(spec.kernels.chosen, device.name, config.runtime.attention_backend)
    if default is not None:
        logger.info("%s", default)
    for operator, implementation, why_not in () if default else describe(spec.kernels.chosen):
        logger.info("kernel %s: %s%s", operator, implementation, f" ({why_not})" if why_not else "")
    save = config.checkpoint.save
    if save is None:
        logger.warning("there is no --save: this run will leave neither checkpoints nor metrics")
    elif launch.rank == 0:
        write_config(config, save)
