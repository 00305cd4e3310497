"""What each rank of a layout would hold, found by building its part of the model without memory and without peers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed

from megatron_flashi2v.config.layout import model_ranks, virtual_stages
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.stages import Stage
from megatron_flashi2v.parallel.groups import destroy_groups, make_groups
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.redirect import megatron_on
from megatron_flashi2v.training.chunks import build_chunks


@dataclass(frozen=True)
class Holding:
    """What every rank of one pipeline rank's place holds; tensor, context and data ranks hold equally much.

    Attributes:
        stages: its parts of the model.
        parameters: values in its tensors.
        tokens: visual tokens of one sample, padding included.
    """

    stages: tuple[Stage, ...]
    parameters: int
    tokens: int


def holdings(config: TrainConfig, model: ModelConfig, latent_shape: tuple[int, int, int]) -> list[Holding]:
    """One entry for each pipeline rank, by building its stages on the meta device.

    Args:
        config: the layout; checked.
        model: resolved dimensions.
        latent_shape: latent frames, rows and columns of the data.
    """
    # Replicas hold the same: one stands for all.
    parallel = dataclasses.replace(config.parallel, use_distributed_optimizer=False)
    world, pipeline = model_ranks(parallel), parallel.pipeline_model_parallel_size
    return [_holding(config, model, latent_shape, rank * (world // pipeline), world) for rank in range(pipeline)]


def _holding(
    config: TrainConfig, model: ModelConfig, latent_shape: tuple[int, int, int], rank: int, world: int
) -> Holding:
    nowhere = CpuDevice()
    nowhere.torch_device = torch.device("meta")
    torch.distributed.init_process_group("fake", rank=rank, world_size=world)
    try:
        with megatron_on(nowhere):
            spec = make_spec(
                model, make_groups(config.parallel), torch.device("cpu"), bf16=config.batch.bf16,
                virtual_stages=virtual_stages(config.parallel),
            )
            chunks = build_chunks(spec, config, nowhere)
    finally:
        destroy_groups()
        torch.distributed.destroy_process_group()
    return Holding(
        stages=tuple(chunk.stage for chunk in chunks),
        parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        tokens=chunks[0].packed_shape(chunks[0].grid(latent_shape)).tokens,
    )
