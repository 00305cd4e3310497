"""Tensor-parallel linears: megatron-core's, with the product of ``linear_function``, and how they are built."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.linear_function import AddWeightGradient, Exchange, add_weight_gradient, linear


class FusedColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's linear with sharded outputs, and our product.

    Attributes:
        add_weight_gradient: adds a weight gradient to its fp32 buffer.
        adapter: what is added to its product, from the same inputs to the same shard of the outputs, if anything.
    """

    add_weight_gradient: AddWeightGradient = staticmethod(add_weight_gradient)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.adapter: nn.Module | None = None

    def forward(self, input_: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        """Outputs, and the bias where it is left to the caller."""
        output, left = self._product(input_, *rest)
        return output if self.adapter is None else output + self.adapter(input_), left

    def _product(self, input_: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        """Alone, a rank has nothing to exchange or to gather."""
        if self.tp_group.size() > 1 or rest:
            return super().forward(input_, *rest)
        own, left = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return linear(input_, self.weight, own, Exchange(), self.add_weight_gradient), left

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup,
        **_: Any,
    ) -> Tensor:
        exchange = Exchange(tp_group if allreduce_dgrad or sequence_parallel else None, sequence_parallel)
        return linear(input, weight, bias, exchange, self.add_weight_gradient)


class FusedRowParallelLinear(RowParallelLinear):
    """megatron-core's linear with sharded inputs, and our product.

    Attributes:
        add_weight_gradient: adds a weight gradient to its fp32 buffer.
        adapter: what is added to its outputs, from the same shard of the inputs, if anything.
    """

    add_weight_gradient: AddWeightGradient = staticmethod(add_weight_gradient)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.adapter: nn.Module | None = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs, and the bias where it is left to the caller; added after the sum over ranks, if there is one."""
        output, left = self._product(input_)
        return output if self.adapter is None else output + self.adapter(input_), left

    def _product(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1 or self.skip_bias_add:
            return super().forward(input_)
        return self._forward_impl(input_, self.weight, self.bias), None

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        return linear(input, weight, bias, Exchange(), self.add_weight_gradient)


class WholeLinear(nn.Module):
    """Y = X A^T with A whole on every tensor-parallel rank, and our product; X's tokens may be sharded.

    Args:
        input_size: columns of A.
        output_size: its rows.
        dtype: its.
    """

    def __init__(self, input_size: int, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=dtype))

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        """Outputs, and None for the bias, as the parallel linears return them."""
        return linear(rows, self.weight, None, Exchange(), add_weight_gradient), None


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
    bias: bool = True,
) -> nn.Module:
    """Y = X A^T + b with A's rows (the outputs) sharded; under sequence parallelism X's tokens are gathered.

    With ``skip_bias_add`` it returns (X A^T, b) instead of (Y, None), for a kernel that adds the bias itself.
    """
    return _build(
        linear_class, input_size, output_size, config, groups, gather_output=gather_output,
        skip_bias_add=skip_bias_add, bias=bias,
    )


def row_parallel(
    linear_class: type[nn.Module], input_size: int, output_size: int, config: TransformerConfig, groups: Groups,
    *, bias: bool = True,
) -> nn.Module:
    """Y = X A^T + b with A's columns (the inputs) sharded; the partial products are summed over the group."""
    return _build(
        linear_class, input_size, output_size, config, groups, input_is_parallel=True, skip_bias_add=False, bias=bias
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
        is_expert=False,
        tp_group=groups.tp,
        **kind,
    )
