"""megatron-core's tensor-parallel linears as this project builds them."""

from __future__ import annotations

import copy

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
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
        linear_class, input_size, output_size, config, groups, {"weight": 0, "bias": 0}, gather_output=gather_output,
        skip_bias_add=skip_bias_add,
    )


def row_parallel(
    linear_class: type[nn.Module], input_size: int, output_size: int, config: TransformerConfig, groups: Groups
) -> nn.Module:
    """Y = X A^T + b with A's columns (the inputs) sharded; the partial products are summed over the group."""
    return _build(
        linear_class, input_size, output_size, config, groups, {"weight": 1}, input_is_parallel=True,
        skip_bias_add=False,
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
    sharded_dims: dict[str, int],
    **kind: bool,
) -> nn.Module:
    linear = linear_class(
        input_size,
        output_size,
        config=config,
        init_method=_no_init,
        bias=True,
        is_expert=False,
        tp_group=groups.tp,
        **kind,
    )
    # megatron-core sets these attributes while it draws the weights, which we do not let it do. Without them the
    # gradient norm would count only the first rank's slice.
    for name, dim in sharded_dims.items():
        parameter = getattr(linear, name)
        for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    return linear
