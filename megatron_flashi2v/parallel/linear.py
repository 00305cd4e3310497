"""megatron-core's tensor-parallel linears as this project builds them."""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn

from megatron_flashi2v.parallel.groups import Groups


def _no_init(_: torch.Tensor) -> None:
    """Weights are drawn later, keyed by their global name (models/initialization.py)."""


def column_parallel(
    linear_class: type[nn.Module],
    input_size: int,
    output_size: int,
    config: TransformerConfig,
    groups: Groups,
    *,
    gather_output: bool = False,
    skip_bias_add: bool = False,
) -> nn.Module:
    """Y = X A^T + b with A's rows (the outputs) sharded; under sequence parallelism X's tokens are gathered.

    With ``skip_bias_add`` it returns (X A^T, b) instead of (Y, None), for a kernel that adds the bias itself.
    """
    return _build(
        linear_class, input_size, output_size, config, groups, gather_output=gather_output, skip_bias_add=skip_bias_add
    )


def row_parallel(
    linear_class: type[nn.Module], input_size: int, output_size: int, config: TransformerConfig, groups: Groups
) -> nn.Module:
    """Y = X A^T + b with A's columns (the inputs) sharded; the partial products are summed over the group."""
    return _build(
        linear_class, input_size, output_size, config, groups, input_is_parallel=True, skip_bias_add=False
    )


def replicated_fp32(config: TransformerConfig) -> TransformerConfig:
    """The same configuration for a linear in fp32 on rows that every rank holds (the time projection)."""
    fp32 = copy.copy(config)
    fp32.params_dtype = torch.float32
    fp32.sequence_parallel = False
    return fp32


def _build(
    linear_class: type[nn.Module],
    input_size: int,
    output_size: int,
    config: TransformerConfig,
    groups: Groups,
    **kind: bool,
) -> nn.Module:
    return linear_class(
        input_size,
        output_size,
        config=config,
        init_method=_no_init,
        bias=True,
        is_expert=False,
        tp_group=groups.tp,
        **kind,
    )
