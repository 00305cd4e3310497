"""``flashi2v train``: pretraining on one process or many."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence

from megatron_flashi2v.cli.errors import leaving_group
from megatron_flashi2v.config.hccl import parse_buffer_sizes
from megatron_flashi2v.config.layout import model_ranks
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.recipe import flat_values, parse
from megatron_flashi2v.config.rules import check_train, hang_timeout_s
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch


def main(argv: Sequence[str]) -> int:
    """Train, or with ``--dry-run`` print what would be trained."""
    config = parse(TrainConfig, argv, prog="flashi2v train", description="Pretrain a FlashI2V diffusion transformer.")
    launch = detect_launch(os.environ)
    model = resolve_model(config.model)
    if config.runtime.dry_run:
        check_train(config, model, max(launch.world_size, model_ranks(config.parallel)))
        if launch.rank == 0:
            sys.stdout.write(dry_run_report(config, model, launch))
        return 0
    check_train(config, model, launch.world_size)
    run(config, model, launch)
    return 0


def run(config: TrainConfig, model: ModelConfig, launch: LaunchEnvironment) -> None:
    """Initialise device and groups, train, and leave the groups in order."""
    import torch

    from megatron_flashi2v.runtime.device import resolve_device
    from megatron_flashi2v.runtime.distributed import init_distributed
    from megatron_flashi2v.runtime.hang_watch import HangWatch
    from megatron_flashi2v.runtime.logging import setup_logging
    from megatron_flashi2v.runtime.redirect import megatron_on

    setup_logging(launch.rank)
    device = resolve_device(
        config.runtime.device, launch.local_rank, backend=config.parallel.distributed_backend,
        hccl_buffer_sizes=parse_buffer_sizes(config.parallel.hccl_buffer_sizes),
    )
    if config.runtime.use_mindspeed:
        from megatron_flashi2v.runtime.mindspeed import load_mindspeed

        load_mindspeed(config)
    torch.use_deterministic_algorithms(config.runtime.deterministic)
    init_distributed(launch, device, config.parallel.distributed_timeout_minutes)
    watch = HangWatch(hang_timeout_s(config, launch.world_size), config.checkpoint.save, launch, device.torch_device)
    with leaving_group(launch), watch:
        # megatron-core compiles small functions while it is imported, which torch must do unredirected.
        from megatron_flashi2v.parallel.groups import destroy_groups
        from megatron_flashi2v.training.trainer import Trainer

        with megatron_on(device):
            try:
                Trainer(config, model, launch, device, watch).train()
            finally:
                destroy_groups()


def dry_run_report(config: TrainConfig, model: ModelConfig, launch: LaunchEnvironment) -> str:
    """The resolved configuration, exact parameter counts and the layout, as YAML with comments."""
    import yaml

    from megatron_flashi2v.checkpoint.key_table import parameter_shapes
    from megatron_flashi2v.config.layout import data_parallel_size
    from megatron_flashi2v.config.rules import num_microbatches

    parallel = config.parallel
    world = max(launch.world_size, model_ranks(parallel))
    total = parameter_count(parameter_shapes(model))
    without = parameter_count(parameter_shapes(dataclasses.replace(model, conditioning="text_to_video")))
    replicas = data_parallel_size(parallel, world)
    lines = [
        "# resolved configuration",
        yaml.safe_dump(flat_values(config), sort_keys=False).rstrip(),
        "",
        "# model",
        yaml.safe_dump(model.to_json(), sort_keys=False, default_flow_style=None).rstrip(),
        "",
        "# parameters",
        f"total: {total:,}",
        f"text_to_video_part: {without:,}",
        f"{model.conditioning}_part: {total - without:,}",
        "",
        "# layout",
        f"processes: {world}",
        f"tensor: {parallel.tensor_model_parallel_size}"
        + (" with sequence parallelism" if parallel.sequence_parallel else ""),
        f"pipeline: {parallel.pipeline_model_parallel_size}",
        f"context: {parallel.context_parallel_size}",
        f"data: {replicas}" + (" with distributed optimizer" if parallel.use_distributed_optimizer else ""),
        f"microbatches: {num_microbatches(config, world)} of {config.batch.micro_batch_size}",
    ]
    lines += ["", *held_by_ranks(config, model, replicas), "", *chosen_kernels(config, model)]
    return "\n".join(lines) + "\n"


def chosen_kernels(config: TrainConfig, model: ModelConfig) -> list[str]:
    """Which implementation of every operator this machine would run, and why not a preferred one.

    A dry run may happen where the training's devices are not: then it says so.
    """
    import torch

    from flashi2v_kernels.registry import describe
    from megatron_flashi2v.config.errors import ConfigError
    from megatron_flashi2v.config.layout import ring_degree
    from megatron_flashi2v.models.spec import choose_kernels
    from megatron_flashi2v.runtime.device import resolve_device

    try:
        device = resolve_device(config.runtime.device)
        kernels = choose_kernels(
            device.torch_device, torch.bfloat16 if config.batch.bf16 else torch.float32, model,
            config.runtime.attention_backend, ring=ring_degree(config.parallel) > 1,
            tensor_parallel=config.parallel.tensor_model_parallel_size > 1,
        )
    except ConfigError as error:
        return [f"# kernels: not those of the training, for on this machine: {error}"]
    rows = describe(kernels.chosen)
    return [f"# kernels on this machine's {device.name}",
            *(f"{operator}: {name}" + (f"  # {why_not}" if why_not else "") for operator, name, why_not in rows)]


def held_by_ranks(config: TrainConfig, model: ModelConfig, replicas: int) -> list[str]:
    """What each rank holds, one line for each place in the pipeline."""
    from megatron_flashi2v.runtime.logging import setup_logging

    setup_logging(0)
    from megatron_flashi2v.training.holdings import holdings

    parallel = config.parallel
    shape, source = data_shape(config.data.data_path)
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    lines = [
        "# held by each rank",
        f"# rank = tensor + {tensor} x (context + {context} x (data + {replicas} x pipeline)), each counted from 0",
    ]
    for rank, held in enumerate(holdings(config, model, shape)):
        parts = [f"blocks {stage.layers.start} to {stage.layers.stop - 1}" for stage in held.stages]
        if held.stages[0].is_first:
            parts.insert(0, "embeddings")
        if held.stages[-1].is_last:
            parts.append("head")
        lines += [
            f"pipeline_{rank}:", f"  holds: {', '.join(parts)}", f"  parameters: {held.parameters:,}",
            f"  visual_tokens: {held.tokens:,}  # {source}",
        ]
    return lines


def data_shape(data_path: tuple[str, ...]) -> tuple[tuple[int, int, int], str]:
    """Latent frames, rows and columns of a sample, and where that was read; of the released models, before there are
    data."""
    from megatron_flashi2v.config.blend import parse_blend
    from megatron_flashi2v.config.errors import DataError
    from megatron_flashi2v.data.prepared import PreparedDataset

    if data_path:
        folder = parse_blend(data_path)[0].folder
        try:
            return PreparedDataset(folder).info.latent_shape[1:], f"a sample of {folder}"
        except DataError:
            pass
    return (13, 60, 104), "49 frames of 480 x 832 in Wan's VAE, as there are no prepared data yet"


def parameter_count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Values in all tensors."""

    return sum(math.prod(shape) for shape in shapes.values())
