"""The choice of linears. Transformer Engine itself cannot run here: its place is taken by what our code asks of it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BackendArguments
from megatron_flashi2v.models import transformer as transformer_module
from megatron_flashi2v.models.backend import linear_provider
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.linear import FusedColumnParallelLinear, FusedRowParallelLinear
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

CONFIG = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=4,
                     text_dim=8, text_length=6)
TRANSFORMER_ENGINE = BackendArguments(transformer_impl="transformer_engine", fp8_format="hybrid", fp8_recipe="delayed")


class EngineColumn(ColumnParallelLinear):
    """Refuses what TEColumnParallelLinear refuses."""

    def __init__(self, *args, gather_output, **kwargs):
        assert not gather_output, "Transformer Engine linear layers do not support gather_output = True"
        super().__init__(*args, gather_output=gather_output, **kwargs)


class EngineRow(RowParallelLinear):
    pass


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's package, and megatron-core's provider of its linears."""

    class Provider:
        def column_parallel_linear(self) -> type:
            return EngineColumn

        def row_parallel_linear(self) -> type:
            return EngineRow

    provider = ModuleType("provider")
    provider.TESpecProvider = Provider  # type: ignore[attr-defined]
    found = {"transformer_engine.pytorch": ModuleType("te"),
             "megatron.core.extensions.transformer_engine_spec_provider": provider}
    import_module = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: found.get(name) or import_module(name))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(version="2.9.0"))


def test_without_transformer_engine(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    # as MindSpeed leaves it: a module, but no package
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    with pytest.raises(ConfigError, match=r"--transformer-impl.*not installed.*choose local"):
        make_spec(CONFIG, groups, torch.device("cpu"), backend=TRANSFORMER_ENGINE)


def test_transformer_engine_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(version="2.9.0"))
    with pytest.raises(ConfigError, match=r"version 2.9.0 cannot be loaded \(ModuleNotFoundError.*transformer_engine"):
        linear_provider(TRANSFORMER_ENGINE)


def test_linears_and_precision_of_transformer_engine(
    groups: Groups, engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(CONFIG, groups, torch.device("cpu"), bf16=True, backend=TRANSFORMER_ENGINE)
    assert (spec.megatron.transformer_impl, spec.megatron.fp8, spec.megatron.fp8_recipe) == (
        "transformer_engine", "hybrid", "delayed")
    assert spec.megatron.disable_parameter_transpose_cache
    model = DiffusionTransformer(spec)
    linears = {name: type(module) for name, module in model.named_modules()
               if isinstance(module, (ColumnParallelLinear, RowParallelLinear))}
    # in fp32, and gathered
    assert linears.pop("time_embedding.projection") is FusedColumnParallelLinear
    assert set(linears.values()) == {EngineColumn, EngineRow} and len(linears) == 2 + 2 * 7
    inside: list[bool] = []

    @contextlib.contextmanager
    def precision(megatron: object) -> Iterator[None]:
        assert megatron is spec.megatron
        inside.append(True)
        yield
        inside.append(False)

    monkeypatch.setattr(transformer_module, "block_precision", precision)
    seen: dict[str, bool] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.update({name: bool(inside and inside[-1])}))
    grid = model.grid((2, 4, 4))
    rotary = model.rotary(grid, torch.device("cpu"))
    hidden = torch.randn(rotary.tokens, 1, 32, dtype=torch.bfloat16)
    model.run_blocks(hidden, torch.randn(6, 1, 32, dtype=torch.bfloat16), torch.randn(6, 1, 32), rotary)
    assert seen["blocks.1.mlp.linear_fc1"] and inside == [True, False]


def test_local_linears_by_default(groups: Groups) -> None:
    spec = make_spec(CONFIG, groups, torch.device("cpu"))
    assert (spec.column_linear, spec.row_linear) == (FusedColumnParallelLinear, FusedRowParallelLinear)
    assert spec.megatron.fp8 is None
