"""Eager torch with a backward of its own, which keeps the input and one number per row, no fp32 copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.autograd import call
from flashi2v_kernels.chunks import row_chunks, wide_dtype
from flashi2v_kernels.rms_norm.statistics import weight_like_tail


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, sum_of_squares: Tensor | None = None, full_width: int | None = None
) -> Tensor:
    """See :func:`flashi2v_kernels.rms_norm.reference.rms_norm`."""
    return norm_and_turn(x, weight, None, eps, sum_of_squares, full_width)


def norm_and_turn(
    x: Tensor,
    weight: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    eps: float,
    sum_of_squares: Tensor | None,
    full_width: int | None,
    gradient_memory: Callable[[], Tensor] | None = None,
) -> Tensor:
    """The norm, and if there are ``tables`` the rotation of its result, in one pass over memory.

    Args:
        x: [rows, ..., *tail]; heads [S, B, h, D] if there are tables.
        weight: in the tail's shape, or as one row.
        tables: cos and sin [S, D/2].
        eps: added to the mean square.
        sum_of_squares: see :func:`flashi2v_kernels.rms_norm.reference.rms_norm`.
        full_width: likewise.
        gradient_memory: gives, in backward, memory for the gradient of ``x``.
    """
    if (sum_of_squares is None) != (full_width is None):
        raise ValueError("give both sum_of_squares and full_width, or neither")
    weight = weight_like_tail(x, weight, sum_of_squares)
    cos, sin = tables or (None, None)
    if x.ndim == weight.ndim:  # a single row
        sums = None if sum_of_squares is None else sum_of_squares[None]
        return call(_NormAndTurn, x[None], weight, sums, cos, sin, full_width or weight.numel(), eps, None)[0]
    return call(_NormAndTurn, x, weight, sum_of_squares, cos, sin, full_width or weight.numel(), eps, gradient_memory)


def _turn(heads_SBhD: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None, *, back: bool = False) -> Tensor:
    """Heads with pairs of channels turned by their token's angles, or by the negative ones."""
    if cos_SR is None or sin_SR is None:
        return heads_SBhD
    cos, sin = (table.to(heads_SBhD.dtype)[:, None, None, :] for table in (cos_SR, -sin_SR if back else sin_SR))
    pairs = heads_SBhD.contiguous().unflatten(-1, (-1, 2))
    turned = turn_real(pairs, cos, sin) if pairs.device.type == "npu" else turn_complex(pairs, cos, sin)
    return turned.flatten(-2)


def turn_complex(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs [..., 2] times ``cos + i sin``: one operator instead of six and a copy."""
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))


def turn_real(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for NPUs, which lack complex numbers in part of their operators."""
    real, imaginary = pairs.unbind(-1)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


def _rows_of(tables: tuple[Tensor | None, Tensor | None], rows: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if table is None else table[rows] for table in tables)


class _NormAndTurn(torch.autograd.Function):
    """With r = (mean(x^2) + eps)^-1/2 and g turned back: dx = r*(gw - x * r^2 * mean(gw*x)).

    A given sum of squares receives the second term as its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        sum_of_squares: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        width: int,
        eps: float,
        gradient_memory: Callable[[], Tensor] | None,
    ) -> Tensor:
        wide, tail = wide_dtype(x), tuple(range(-weight.ndim, 0))
        factor = weight.to(wide)
        inverse_rms = torch.empty((*x.shape[: -weight.ndim], *[1] * weight.ndim), dtype=wide, device=x.device)
        if sum_of_squares is not None:
            torch.rsqrt(sum_of_squares.to(wide).view_as(inverse_rms) / width + eps, out=inverse_rms)
        pieces = []
        for rows in row_chunks(x):
            piece = x[rows].to(wide).contiguous()  # a reduction of a strided view takes several times as long
            if sum_of_squares is None:
                norm = torch.linalg.vector_norm(piece, dim=tail, keepdim=True)
                inverse_rms[rows] = torch.rsqrt(norm.square() / width + eps)
            normed = (piece * inverse_rms[rows]).mul_(factor)
            pieces.append(_turn(normed, *_rows_of((cos, sin), rows)).to(x.dtype))
        output = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        ctx.save_for_backward(x, weight, inverse_rms, cos, sin)
        ctx.gradient_memory = gradient_memory or partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
        ctx.width, ctx.sum_dtype = width, None if sum_of_squares is None else sum_of_squares.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms, cos, sin = ctx.saved_tensors
        wide, tail = wide_dtype(x), tuple(range(-weight.ndim, 0))
        factor, own_sum = weight.to(wide), ctx.sum_dtype is None
        grad_x = ctx.gradient_memory() if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if ctx.needs_input_grad[1] else None
        # of every row, the sum of gradient * weight * normalised
        projection = torch.empty_like(inverse_rms)
        for rows in row_chunks(x):
            gradient = _turn(gradients[0][rows].to(wide), *_rows_of((cos, sin), rows), back=True)
            normed = x[rows].to(wide) * inverse_rms[rows]
            by_normed = gradient * normed
            if grad_weight is not None:
                grad_weight += by_normed.flatten(0, -weight.ndim - 1).sum(dim=0)
            projection[rows] = by_normed.mul_(factor).sum(dim=tail, keepdim=True)
            if grad_x is not None:
                weighted = gradient * factor
                if own_sum:
                    weighted.sub_(normed.mul_(projection[rows] / ctx.width))
                grad_x[rows] = weighted.mul_(inverse_rms[rows])
        grad_sum = None
        if not own_sum and ctx.needs_input_grad[2]:
            grad_sum = projection * inverse_rms.square() * (-0.5 / ctx.width)
            grad_sum = grad_sum.view(x.shape[: x.ndim - weight.ndim]).to(ctx.sum_dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, grad_sum, *[None] * 5
