"""Norms with weights against their formulas, with inputs small enough for the epsilon to count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.norms import AffineLayerNorm, FullWidthRMSNorm
from megatron_flashi2v.models.spec import ModelSpec, make_spec
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

EPS = 3e-3
CONFIG = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, norm_eps=EPS)


@pytest.fixture(scope="module")
def spec() -> Iterator[ModelSpec]:
    with single_process(resolve_device("cpu")) as groups:
        yield make_spec(CONFIG, groups, torch.device("cpu"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_norm(rows: Tensor) -> Tensor:
    rows = rows.double()
    variance = rows.var(dim=-1, correction=0, keepdim=True)
    return (rows - rows.mean(dim=-1, keepdim=True)) / (variance + EPS).sqrt()


def test_affine_layer_norm(spec: ModelSpec) -> None:
    norm, rows = AffineLayerNorm(spec), 0.05 * normal(6, 2, 16)
    with torch.no_grad():
        norm.weight.copy_(normal(16, seed=1))
        norm.bias.copy_(normal(16, seed=2))
    update, gate = 0.05 * normal(6, 2, 16, seed=3), normal(2, 16, seed=4)
    total, normed = norm(rows, update, gate)
    torch.testing.assert_close(total, rows + gate * update)
    torch.testing.assert_close(normed, (layer_norm(total) * norm.weight + norm.bias).float())


def test_rms_norm_is_over_all_heads(spec: ModelSpec) -> None:
    norm, heads = FullWidthRMSNorm(spec), 0.05 * normal(6, 2, 2, 8)
    heads[:, :, 1] *= 5  # a norm of each head by itself would differ
    with torch.no_grad():
        norm.weight.copy_(normal(16, seed=1))
    rows = heads.flatten(-2).double()
    expected = rows / (rows.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * norm.weight
    torch.testing.assert_close(norm(heads).flatten(-2), expected.float())
