"""``flashi2v train``: pretraining on one process or many."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_flashi2v.config.hccl import parse_buffer_sizes
from megatron_flashi2v.config.help import show
from megatron_flashi2v.config.layout import model_ranks
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_train, hang_timeout_s
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch
from megatron_flashi2v.runtime.logging import setup_logging


def main(argv: Sequence[str]) -> int:
    """Train, or with ``--dry-run`` print what would be trained."""
    config = parse(TrainConfig, argv, prog="flashi2v train", description="Pretrain a FlashI2V diffusion transformer.")
    launch = detect_launch(os.environ)
    model = resolve_model(config.model)
    if config.runtime.dry_run:
        world_size = config.runtime.world_size or max(launch.world_size, model_ranks(config.parallel))
        check_train(config, model, world_size)
        if launch.rank == 0:
            setup_logging(0)
            from megatron_flashi2v.planning.dry_run import dry_run_report

            show(dry_run_report(config, model, world_size))
        return 0
    check_train(config, model, launch.world_size)
    run(config, model, launch)
    return 0


def run(config: TrainConfig, model: ModelConfig, launch: LaunchEnvironment) -> None:
    """Resolve the device, enter the world and train."""
    import torch

    from megatron_flashi2v.runtime.device import resolve_device
    from megatron_flashi2v.runtime.hang_watch import HangWatch

    setup_logging(launch.rank)
    device = resolve_device(
        config.runtime.device, launch.local_rank, backend=config.parallel.distributed_backend,
        hccl_buffer_sizes=parse_buffer_sizes(config.parallel.hccl_buffer_sizes),
    )
    if config.runtime.use_mindspeed:
        from megatron_flashi2v.runtime.mindspeed import load_mindspeed

        load_mindspeed(config)
    # These import megatron-core, which MindSpeed must come before.
    from megatron_flashi2v.parallel.world import world
    from megatron_flashi2v.training.trainer import Trainer

    torch.use_deterministic_algorithms(config.runtime.deterministic)
    watch = HangWatch(hang_timeout_s(config, launch.world_size), config.checkpoint.save, launch, device.torch_device)
    timeout_minutes = config.parallel.distributed_timeout_minutes
    with world(device, launch, config.parallel, timeout_minutes=timeout_minutes, watch=watch) as groups:
        Trainer(config, model, groups, launch, device, watch).train()
