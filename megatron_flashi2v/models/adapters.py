"""Low-rank adapters beside a block's linears: y = W x + (alpha / rank) B A x.

Beside a linear with sharded outputs B's rows are sharded as W's, and A is whole; beside one with sharded inputs A's
columns are, and B is whole. What ranks exchange is B's input, of rank channels: gathered tokens, or a sum. So the
whole factor's gradient is whole on every rank, or, under sequence parallelism, of its own tokens, like that of all
parameters that act on single tokens (``parallel/regions.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.models.placement import fused_parts, sharded_dim
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.linear import (
    FusedColumnParallelLinear,
    FusedRowParallelLinear,
    WholeLinear,
    column_parallel,
    row_parallel,
)

ParallelLinear: TypeAlias = FusedColumnParallelLinear | FusedRowParallelLinear

ORIGINALS: Mapping[str, str] = {
    "self_attention.linear_qkv": "self_attn.{part}",
    "self_attention.linear_proj": "self_attn.o",
    "cross_attention.linear_q": "cross_attn.q",
    "cross_attention.linear_kv": "cross_attn.{part}",
    "cross_attention.linear_kv_image": "cross_attn.{part}_img",
    "cross_attention.linear_proj": "cross_attn.o",
    "mlp.linear_fc1": "ffn.0",
    "mlp.linear_fc2": "ffn.2",
}
"""A block's linears, and Wan's name of each, or of each projection that it fuses."""


class LowRankPair(nn.Module):
    """(alpha / rank) B A x.

    Args:
        lora_A: to ``rank`` channels.
        lora_B: from these.
        scale: alpha / rank.
    """

    def __init__(self, lora_A: nn.Module, lora_B: nn.Module, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = lora_A, lora_B, scale

    def forward(self, rows: Tensor) -> Tensor:
        """What is added to the linear's outputs."""
        return self.lora_B(self.scale * self.lora_A(rows)[0])[0]  # type: ignore[no-any-return]


class FusedPairs(nn.ModuleDict):
    """Pairs of some of the projections that a linear fuses, whose rows are (head, projection, channel).

    Args:
        pairs: by projection.
        parts: all projections of the linear, in the order of its rows.
        head_dim: channels of a head.
    """

    def __init__(self, pairs: Mapping[str, LowRankPair], parts: tuple[str, ...], head_dim: int) -> None:
        super().__init__(pairs)
        self.parts, self.head_dim = parts, head_dim

    def forward(self, rows: Tensor) -> Tensor:
        """What is added to the linear's outputs; zeros for projections without a pair."""
        added = {part: pair(rows).unflatten(-1, (-1, self.head_dim)) for part, pair in self.items()}
        one = next(iter(added.values()))
        whole = [added[part] if part in added else torch.zeros_like(one) for part in self.parts]
        return torch.stack(whole, dim=-2).flatten(-3)


def add_adapters(block: nn.Module, spec: ModelSpec, adapter: AdapterConfig) -> None:
    """Put low-rank pairs, with weights to be set, beside a block's targeted linears.

    Args:
        block: a transformer block whose linears are megatron-core's.
        spec: its settings.
        adapter: rank, scale and targets.

    Raises:
        ConfigError: the linears are another library's.
    """
    for path, linear in _linears(block):
        parts = fused_parts(f"blocks.{{i}}.{path}.weight")
        targeted = [part for part in parts or ("",) if ORIGINALS[path].format(part=part) in adapter.targets]
        pairs = {part: _pair(path, linear, len(parts) or 1, spec, adapter) for part in targeted}
        if pairs:
            linear.adapter = FusedPairs(pairs, parts, spec.config.head_dim) if parts else pairs[""]


def scale_adapters(model: nn.Module, factor: float) -> None:
    """Multiply what all of a model's pairs add by a factor, of any sign."""
    for module in model.modules():
        if isinstance(module, LowRankPair):
            module.scale *= factor


def _linears(block: nn.Module) -> Iterator[tuple[str, ParallelLinear]]:
    """The block's linears by their names in it; those of the image's rows are not in all models."""
    modules = dict(block.named_modules())
    for path in ORIGINALS:
        if path in modules:
            linear = modules[path]
            if not isinstance(linear, ParallelLinear):
                raise ConfigError(
                    f"--lora-rank needs megatron-core's own linears, and {path} is a {type(linear).__name__}; leave "
                    "out --use-mindspeed, or what else replaces them"
                )
            yield path, linear


def _pair(path: str, linear: ParallelLinear, parts: int, spec: ModelSpec, adapter: AdapterConfig) -> LowRankPair:
    """The pair of one of the linear's projections."""
    inputs, outputs, rank = linear.input_size, linear.output_size // parts, adapter.rank
    if sharded_dim(f"blocks.{{i}}.{path}.weight") == 0:
        lora_A: nn.Module = WholeLinear(inputs, rank, spec.dtype)
        lora_B = column_parallel(spec.column_linear, rank, outputs, spec.megatron, spec.groups, bias=False)
    else:
        lora_A = row_parallel(spec.row_linear, inputs, rank, spec.megatron, spec.groups, bias=False)
        lora_B = WholeLinear(rank, outputs, spec.dtype)
    return LowRankPair(lora_A, lora_B, adapter.scale)
