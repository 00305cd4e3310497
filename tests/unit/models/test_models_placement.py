"""What is declared of parameters is what the built model has, at every layout and for every paradigm."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import pytest
import torch
from helpers.paradigms import PARADIGMS
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.conditioning.flashi2v import FlashI2V
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.models import transformer
from megatron_flashi2v.models.placement import PLACEMENTS, parameter_box, placement_of, sharded_dim
from megatron_flashi2v.models.recompute import build_block
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import destroy_groups, make_groups
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.redirect import megatron_on

CONFIG = ModelConfig(
    num_layers=11, hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, latent_channels=4, freq_dim=32,
    text_dim=24, text_length=8, phi_hidden_channels=8,
)


@contextlib.contextmanager
def built(config: ModelConfig, tp_size: int = 1, rank: int = 0) -> Iterator[DiffusionTransformer]:
    """The model as one of ``tp_size`` ranks holds it, without memory and without peers."""
    nowhere = CpuDevice()
    nowhere.torch_device = torch.device("meta")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp_size)
    try:
        with megatron_on(nowhere), nowhere.torch_device:
            groups = make_groups(
                ParallelArguments(tensor_model_parallel_size=tp_size, sequence_parallel=tp_size > 1)
            )
            yield DiffusionTransformer(make_spec(config, groups, torch.device("cpu")))
    finally:
        destroy_groups()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", PARADIGMS)
def test_the_declared_names_are_the_models(name: str) -> None:
    config = dataclasses.replace(CONFIG, conditioning=name)
    with built(config) as model:
        names = [key for key, _ in model.named_parameters()]
        own = {key.split(".")[1] for key in names if key.startswith("conditioning.")}
        backbone = {re.sub(r"^blocks\.\d+\.", "blocks.{i}.", key) for key in names if "conditioning." not in key}
    image = {name for name in PLACEMENTS if "image" in name}
    assert len(image) == 11 and backbone == set(PLACEMENTS) - (set() if name == "wan_i2v" else image)
    paradigm = paradigm_of(config)
    assert sorted(own) == sorted(paradigm.token_modules + paradigm.latent_modules)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", PARADIGMS)
def test_slices_are_those_that_the_linears_hold(name: str, tp_size: int) -> None:
    """megatron-core's linears divide their sizes by themselves: whole shapes must be those of the key table."""
    config = dataclasses.replace(CONFIG, conditioning=name, num_layers=1)
    with built(config, tp_size, rank=1) as model:
        local = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    grid = ShardGrid(tp_rank=1, tp_size=tp_size)
    boxes = {name: parameter_box(name, shape, grid) for name, shape in local.items()}
    assert {name: box.global_shape for name, box in boxes.items()} == parameter_shapes(config)
    for name, box in boxes.items():
        dim = sharded_dim(name)
        assert box.offset == tuple(box.shape[axis] if axis == dim else 0 for axis in range(len(box.shape))), name


def test_marks_of_a_model() -> None:
    """Every parameter is sharded or acts on tokens, but for what makes rows that all ranks hold."""
    with built(CONFIG, 2) as model:
        parameters = dict(model.named_parameters())
    sharded = {name for name, parameter in parameters.items() if parameter.tensor_model_parallel}
    assert all(parameters[name].partition_dim == sharded_dim(name) for name in sharded)
    assert all(parameter.partition_stride == 1 for parameter in parameters.values())
    summed = {name for name, parameter in parameters.items() if parameter.sequence_parallel}
    assert not summed & sharded
    rest = {name.rpartition(".")[0] for name in parameters.keys() - summed - sharded}
    assert rest == {f"conditioning.phi.conv_{end}" for end in ("in", "out")} | {
        f"time_embedding.linear_{number}" for number in (1, 2)
    }


def test_an_undeclared_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(*arguments: object) -> nn.Module:
        block = build_block(*arguments)
        block.gate = nn.Linear(2, 2)
        return block

    with monkeypatch.context() as patch:
        patch.setattr(transformer, "build_block", with_another)
        with pytest.raises(LookupError, match=r"blocks\.0\.gate\.weight has no placement; declare it in models/pl"):
            built(CONFIG).__enter__()
    monkeypatch.setattr(FlashI2V, "token_modules", ())
    with (
        pytest.raises(LookupError, match=r"conditioning\.fourier_embedding\.conv_in\.weight .* FlashI2V\.token_modul"),
        built(CONFIG),
    ):
        pass


def test_facts_by_name() -> None:
    qkv = placement_of("blocks.10.self_attention.linear_qkv.weight", FlashI2V)
    assert (qkv.sharded_dim, qkv.fused, qkv.on_tokens) == (0, ("q", "k", "v"), False)
    assert placement_of("conditioning.fourier_embedding.conv_in.bias", FlashI2V).on_tokens
    assert not placement_of("conditioning.phi.conv_in.bias", FlashI2V).on_tokens
    for name in ("blocks.modulation", "blocks.1.blocks.2.modulation", "head.linear", ""):
        with pytest.raises(LookupError, match="has no placement"):
            sharded_dim(name)
