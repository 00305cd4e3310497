"""Shapes and partial sums that all implementations of the norm share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.autograd import call


def weight_like_tail(x: Tensor, weight: Tensor, sum_of_squares: Tensor | None = None) -> Tensor:
    """View ``weight`` in the shape of the trailing dimensions of ``x`` that are normalised.

    A rank's query is often a strided view [tokens, batch, heads, head size], while its weight is one row of
    heads * head size numbers: the norm then runs over the last two dimensions, without a copy of the query.

    Args:
        x: [..., *tail].
        weight: the tail's shape, or as many numbers in one row.
        sum_of_squares: [...], one number for each tail, if it was summed outside.

    Raises:
        ValueError: no number of trailing dimensions of ``x`` fits the weight and the sums.
    """
    for dims in range(1, x.ndim + 1):
        rows, tail = x.shape[: x.ndim - dims], x.shape[x.ndim - dims :]
        weight_fits = tuple(weight.shape) in (tuple(tail), (math.prod(tail),))
        # the sums distinguish (1 head, head size) from (head size), which have equally many numbers
        if weight_fits and (sum_of_squares is None or sum_of_squares.shape == rows):
            return weight.view(tail)
    sums = "" if sum_of_squares is None else f" and sums {tuple(sum_of_squares.shape)}"
    raise ValueError(f"weight {tuple(weight.shape)}{sums} do not fit the last dimensions of {tuple(x.shape)}")


def widened(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def local_sum_of_squares(x: Tensor, dims: int) -> Tensor:
    """Sum of squares over the last ``dims`` dimensions, to be summed over the ranks that share the width.

    Args:
        x: [..., *tail], any strides and float dtype.
        dims: number of dimensions of the tail, 2 for (heads, head size).

    Returns:
        [...] in fp32 (fp64 for fp64 inputs). The sum over ranks must pass gradients back summed over ranks,
        too: every rank's output depends on every rank's part.
    """
    return call(_SumOfSquares, x, dims)


class _SumOfSquares(torch.autograd.Function):
    """Keeps the input as it is, where autograd would keep an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int) -> Tensor:
        ctx.save_for_backward(x)
        return widened(x).square().sum(dim=tuple(range(-dims, 0)))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gradient = gradients[0].view(*gradients[0].shape, *[1] * (x.ndim - gradients[0].ndim))
        return (2.0 * widened(x) * gradient).to(x.dtype), None
