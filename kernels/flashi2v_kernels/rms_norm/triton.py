"""The norm, and the rotation of its result where there is one, in one pass; heads may be a strided view."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashi2v_kernels import triton_launch
from flashi2v_kernels.autograd import call
from flashi2v_kernels.rms_norm.statistics import weight_like_tail
from flashi2v_kernels.triton_launch import block_of, few_warps_of, runs_of, warps_of, with_unit_stride


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, sum_of_squares: Tensor | None = None, full_width: int | None = None
) -> Tensor:
    """See :func:`flashi2v_kernels.rms_norm.reference.rms_norm`; fp32 inside for every dtype."""
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
    """The norm, then if there are ``tables`` (cos and sin [S, D/2]) the rotation of heads [S, B, h, D]."""
    if (sum_of_squares is None) != (full_width is None):
        raise ValueError("give both sum_of_squares and full_width, or neither")
    weight = weight_like_tail(x, weight, sum_of_squares)
    as_it_is = x.ndim == 4 and weight.ndim == 2
    heads_SBhD = with_unit_stride(x) if as_it_is else x.reshape(-1, 1, 1, weight.numel())
    sums = None if sum_of_squares is None else sum_of_squares.reshape(heads_SBhD.shape[:2])
    cos, sin = (None, None) if tables is None else (table.float().contiguous() for table in tables)
    output = call(
        _NormAndTurn, heads_SBhD, weight, sums, cos, sin, full_width or weight.numel(), eps, gradient_memory
    )
    return output.view(x.shape)


class _NormAndTurn(torch.autograd.Function):
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
        tokens, batch, heads, size = x.shape
        weight, block = weight.contiguous(), block_of(heads * size)
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse_rms = torch.empty((tokens, batch), dtype=torch.float32, device=x.device)
        sums = inverse_rms if sum_of_squares is None else sum_of_squares.float().contiguous()
        turns = cos is not None
        triton_launch.launch(
            turn_forward, (tokens * batch,),
            x, weight, sums, cos if turns else sums, sin if turns else sums, output, inverse_rms,
            x.stride(0), x.stride(1), x.stride(2), batch, heads * size, width, eps,
            HEAD=size, BLOCK=block, OWN_SUM=sum_of_squares is None, TURN=turns,
            num_warps=few_warps_of(block),
        )
        ctx.save_for_backward(x, weight, inverse_rms, cos, sin)
        ctx.gradient_memory = gradient_memory or partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
        ctx.width, ctx.sum_dtype = width, None if sum_of_squares is None else sum_of_squares.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms, cos, sin = ctx.saved_tensors
        gradient, own_sum, turns = with_unit_stride(gradients[0]), ctx.sum_dtype is None, cos is not None
        tokens, batch, heads, size = x.shape
        rows, numbers, block = tokens * batch, heads * size, block_of(heads * size)
        length, runs = runs_of(rows)
        grad_x = ctx.gradient_memory()
        grad_sum = torch.empty_like(inverse_rms)
        parts = torch.empty((runs, numbers), dtype=torch.float32, device=x.device)
        triton_launch.launch(
            turn_backward, (runs,),
            gradient, x, weight, inverse_rms, cos if turns else inverse_rms, sin if turns else inverse_rms,
            grad_x, grad_sum, parts, *gradient.stride()[:3], *x.stride()[:3], *grad_x.stride()[:3],
            length, rows, batch, numbers, ctx.width,
            HEAD=size, BLOCK=block, OWN_SUM=own_sum, TURN=turns, num_warps=warps_of(block, most=32),
        )
        needs = ctx.needs_input_grad
        return (
            grad_x if needs[0] else None,
            parts.sum(dim=0).view_as(weight).to(weight.dtype) if needs[1] else None,
            None if own_sum or not needs[2] else grad_sum.to(ctx.sum_dtype),
            *[None] * 5,
        )


@triton.jit
def _turned(row, cos, sin):
    """A row with its pairs of neighbours turned; pairs are formed in registers, since memory is read row by row."""
    even, odd = tl.split(tl.reshape(row, (row.shape[0] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (row.shape[0],))


@triton.jit
def turn_forward(
    x_ptr, weight_ptr, sum_ptr, cos_ptr, sin_ptr, out_ptr, rms_ptr, x_token, x_sample, x_head,
    batch, numbers, width, eps,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, OWN_SUM: tl.constexpr, TURN: tl.constexpr,
):
    """Program ``token * batch + sample`` computes that row of ``numbers`` channels; ``width`` of them are averaged."""
    row = tl.program_id(0)
    token, sample = (row // batch).to(tl.int64), row % batch
    number = tl.arange(0, BLOCK)
    inside = number < numbers
    place = token * x_token + sample * x_sample + (number // HEAD) * x_head + number % HEAD
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=0) if OWN_SUM else tl.load(sum_ptr + row)
    inverse_rms = 1.0 / tl.sqrt(squares / width + eps)
    tl.store(rms_ptr + row, inverse_rms)
    weight = tl.load(weight_ptr + number, mask=inside, other=0.0).to(tl.float32)
    out = x * inverse_rms * weight
    if TURN:
        pair = tl.arange(0, BLOCK // 2)
        angle = token * (HEAD // 2) + pair % (HEAD // 2)
        cos = tl.load(cos_ptr + angle)
        sin = tl.load(sin_ptr + angle)
        out = _turned(out, cos, sin)
    tl.store(out_ptr + row.to(tl.int64) * numbers + number, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def turn_backward(
    g_ptr, x_ptr, weight_ptr, rms_ptr, cos_ptr, sin_ptr, dx_ptr, d_sum_ptr, part_ptr,
    g_token, g_sample, g_head, x_token, x_sample, x_head, dx_token, dx_sample, dx_head,
    length, rows, batch, numbers, width,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, OWN_SUM: tl.constexpr, TURN: tl.constexpr,
):
    """Program ``run``: ``length`` rows, and their part of the weight's sum.

    With g turned back, n = x * r and w = g * weight: dx = r * (w - n * mean(w * n)), or where the sum of squares
    came from outside dx = r * w and dsum = -r^2 * sum(w * n) / (2 width).
    """
    run = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    head, channel, inside = number // HEAD, number % HEAD, number < numbers
    weight = tl.load(weight_ptr + number, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK,), tl.float32)
    for row in range(run * length, tl.minimum((run + 1) * length, rows)):
        at = tl.cast(row, tl.int64)
        token, sample = at // batch, at % batch
        g_place = token * g_token + sample * g_sample + head * g_head + channel
        x_place = token * x_token + sample * x_sample + head * x_head + channel
        g = tl.load(g_ptr + g_place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_place, mask=inside, other=0.0).to(tl.float32)
        if TURN:
            pair = tl.arange(0, BLOCK // 2)
            angle = token * (HEAD // 2) + pair % (HEAD // 2)
            cos = tl.load(cos_ptr + angle)
            sin = tl.load(sin_ptr + angle)
            g = _turned(g, cos, -sin)
        inverse_rms = tl.load(rms_ptr + at)
        normed = x * inverse_rms
        part += g * normed
        weighted = g * weight
        projection = tl.sum(weighted * normed, axis=0) / width
        if OWN_SUM:
            weighted -= normed * projection
        else:
            tl.store(d_sum_ptr + at, -0.5 * inverse_rms * inverse_rms * projection)
        dx = weighted * inverse_rms
        dx_place = token * dx_token + sample * dx_sample + head * dx_head + channel
        tl.store(dx_ptr + dx_place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(part_ptr + run.to(tl.int64) * numbers + number, part, mask=inside)
