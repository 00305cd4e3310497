"""The builder: stages in order, on their device, recomputing as the flags ask."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments, RecomputeArguments
from megatron_flashi2v.models.build import build_stages, recompute_of
from megatron_flashi2v.models.recompute import Recompute
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.parallel.world import single_process, world
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.distributed import init_without_peers
from megatron_flashi2v.runtime.launch import LaunchEnvironment

CONFIG = ModelConfig(
    num_layers=5, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=4, freq_dim=16,
    text_dim=16, text_length=8,
)  # fmt: skip


@pytest.mark.parametrize("granularity, method, count, expected", [
    (None, "uniform", 1, Recompute(layers=0)),
    ("full", "uniform", 1, Recompute(layers=4, group=1)),
    ("full", "uniform", 3, Recompute(layers=4, group=3)),
    ("full", "block", 3, Recompute(layers=3, group=1)),
    ("full", "block", 9, Recompute(layers=4, group=1)),
    ("selective", "uniform", 1, Recompute(inside="selective")),
    ("skip_attention", "uniform", 1, Recompute(inside="skip_attention")),
])
def test_recomputed_blocks_of_a_stage_of_four(
    granularity: str | None, method: str, count: int, expected: Recompute
) -> None:
    arguments = RecomputeArguments(
        recompute_granularity=granularity, recompute_method=method, recompute_num_layers=count
    )
    assert recompute_of(arguments, 4) == expected


@pytest.mark.parametrize("rank, layers", [(0, [range(0, 1), range(3, 4)]), (1, [range(1, 3), range(4, 5)])])
def test_stages_of_a_rank_in_the_order_of_the_activation(rank: int, layers: list[range]) -> None:
    parallel = ParallelArguments(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
    launch = LaunchEnvironment(rank=rank, world_size=2, local_rank=rank, local_world_size=2)
    device = CpuDevice()
    device.torch_device = torch.device("meta")
    with world(device, launch, parallel, start=init_without_peers) as groups:
        spec = make_spec(CONFIG, groups, torch.device("cpu"), virtual_stages=2)
        spec = dataclasses.replace(spec, device=device.torch_device)
        stages = build_stages(spec, parallel, RecomputeArguments(recompute_granularity="full"))
        assert [model.recompute for model in build_stages(spec, parallel)] == 2 * [Recompute()]
    assert [model.stage.layers for model in stages] == layers
    assert [list(map(int, model.blocks)) for model in stages] == [list(stage) for stage in layers]
    assert [model.recompute.layers for model in stages] == [len(stage) for stage in layers]
    assert all(model.training for model in stages)
    assert all(parameter.is_meta for model in stages for parameter in model.parameters())


def test_a_hollow_stage_is_built_without_memory() -> None:
    with single_process(CpuDevice()) as groups:
        spec = make_spec(CONFIG, groups, torch.device("cpu"), bf16=True)
        (plain,), (hollow,) = (build_stages(spec, ParallelArguments(), hollow=way) for way in (False, True))
        assert not spec.megatron.use_cpu_initialization
    expected = dict(plain.named_parameters())
    found = dict(hollow.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        want = expected[name]
        assert (parameter.shape, parameter.dtype, parameter.device) == (want.shape, want.dtype, want.device), name
        assert vars(parameter) == vars(want), name
        assert parameter.untyped_storage().nbytes() == parameter.itemsize < want.untyped_storage().nbytes(), name
