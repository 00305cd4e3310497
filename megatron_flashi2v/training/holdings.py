"""What each rank of a layout holds: of a run, and of one that is only planned, by building each part without memory."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed

from megatron_flashi2v.config.layout import model_ranks, virtual_stages
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.stages import Stage
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.parallel.groups import destroy_groups, make_groups
from megatron_flashi2v.parallel.regions import rows_per_rank
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.redirect import megatron_on
from megatron_flashi2v.training.chunks import build_chunks


@dataclass(frozen=True)
class Holding:
    """What a rank holds; tensor, context and data ranks of one place in the pipeline hold equally much.

    Attributes:
        stages: its parts of the model.
        parameters: values in its tensors.
        tokens: visual tokens of one sample, of the largest there are, padding included.
    """

    stages: tuple[Stage, ...]
    parameters: int
    tokens: int


def holding_of(chunks: Sequence[DiffusionTransformer], latent_shapes: Sequence[tuple[int, int, int]]) -> Holding:
    """What the rank of these stages holds.

    Args:
        chunks: its stages, built.
        latent_shapes: latent frames, rows and columns of the samples, one for each size.
    """
    tokens = max(math.prod(chunks[0].grid(shape)) for shape in latent_shapes)
    return Holding(
        stages=tuple(chunk.stage for chunk in chunks),
        parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        tokens=rows_per_rank(tokens, chunks[0].spec.groups),
    )


def held_by_all(mine: Holding, place: int) -> list[str]:
    """One line for each place in the pipeline, of what its ranks really hold; all ranks call it.

    Args:
        mine: this rank's.
        place: this rank's in the pipeline.
    """
    numbers = [place, sum(len(stage.layers) for stage in mine.stages), mine.parameters, mine.tokens]
    alike = Counter(tuple(found) for found in gather_json(numbers))
    return [
        f"pipeline rank {where}: each of {count} ranks holds {blocks} blocks, {parameters:,} parameters and {tokens:,} "
        "visual tokens of a sample"
        for (where, blocks, parameters, tokens), count in sorted(alike.items())
    ]


def planned_holdings(
    config: TrainConfig, model: ModelConfig, latent_shapes: Sequence[tuple[int, int, int]]
) -> list[Holding]:
    """One entry for each pipeline rank, by building its stages on the meta device, without peers.

    Args:
        config: the layout; checked.
        model: resolved dimensions.
        latent_shapes: as for :func:`holding_of`.
    """
    # Replicas hold the same: one stands for all.
    parallel = dataclasses.replace(config.parallel, use_distributed_optimizer=False)
    world, pipeline = model_ranks(parallel), parallel.pipeline_model_parallel_size
    return [_planned(config, model, latent_shapes, place * (world // pipeline), world) for place in range(pipeline)]


def _planned(
    config: TrainConfig, model: ModelConfig, latent_shapes: Sequence[tuple[int, int, int]], rank: int, world: int
) -> Holding:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend; no run needs it

    nowhere = CpuDevice()
    nowhere.torch_device = torch.device("meta")
    # With a store of its own: torch 2.7 would look for one by the launcher's variables.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with megatron_on(nowhere):
            spec = make_spec(
                model, make_groups(config.parallel), torch.device("cpu"), bf16=config.batch.bf16,
                virtual_stages=virtual_stages(config.parallel),
            )
            return holding_of(build_chunks(spec, config, nowhere), latent_shapes)
    finally:
        destroy_groups()
        torch.distributed.destroy_process_group()
