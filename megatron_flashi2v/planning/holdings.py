"""Plans what each rank holds: builds its stages on the meta device, without peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.adapter import AdapterArguments, adapter_of
from megatron_flashi2v.config.layout import model_ranks, virtual_stages
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.models.build import build_stages
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.parallel.world import world
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.distributed import init_without_peers
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.training.holdings import Holding, holding_of, parameter_shapes_of
from megatron_flashi2v.training.partial import freeze, picked_tensors


def planned_holdings(
    parallel: ParallelArguments, model: ModelConfig, latent_shapes: Sequence[tuple[int, int, int]], *,
    bf16: bool = False, adapter: AdapterArguments | None = None,
) -> list[Holding]:
    """One entry for each pipeline rank, by building its stages on the meta device.

    Args:
        parallel: the layout; checked.
        model: resolved dimensions.
        latent_shapes: latent frames, rows and columns of the samples, one for each size.
        bf16: whether matrices are in bfloat16.
        adapter: what is trained, if not all; beside weights that lack no tensor.
    """
    adapter = adapter or AdapterArguments()
    # Replicas hold the same: one stands for all.
    parallel = dataclasses.replace(parallel, num_distributed_optimizer_instances=1)
    pipeline, ranks = parallel.pipeline_model_parallel_size, model_ranks(parallel)
    return [
        _planned(parallel, model, latent_shapes, place * (ranks // pipeline), ranks, bf16=bf16, adapter=adapter)
        for place in range(pipeline)
    ]


def _planned(
    parallel: ParallelArguments, model: ModelConfig, latent_shapes: Sequence[tuple[int, int, int]], rank: int,
    world_size: int, *, bf16: bool, adapter: AdapterArguments,
) -> Holding:
    meta = CpuDevice()
    meta.torch_device = torch.device("meta")
    launch = LaunchEnvironment(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    with world(meta, launch, parallel, start=init_without_peers) as groups:
        # Kernels are chosen for a device that computes.
        spec = make_spec(
            model, groups, torch.device("cpu"), bf16=bf16, virtual_stages=virtual_stages(parallel),
            adapter=adapter_of(adapter, has_image_branch=paradigm_of(model).image_rows(model) > 0),
        )
        stages = build_stages(dataclasses.replace(spec, device=meta.torch_device), parallel)
        if adapter.is_partial:
            freeze(stages, picked_tensors(adapter.train_only, model))
        return holding_of(stages, parameter_shapes_of(stages), latent_shapes)
