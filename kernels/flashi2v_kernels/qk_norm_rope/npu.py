"""Ascend's fused norm and rotation one after the other; backward keeps the heads and one number per token.

In fp32, so that the result is rounded once. ``npu_rms_norm`` needs whole rows: where ranks share a row, eager torch
computes the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_npu
from torch import Tensor

from flashi2v_kernels.autograd import call
from flashi2v_kernels.qk_norm_rope.reference import weight_of_heads
from flashi2v_kernels.qk_norm_rope.tables import require_tables


def qk_norm_rope(
    heads_SBhD: Tensor,
    weight: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    eps: float,
    *,
    sum_of_squares: Tensor | None = None,
    full_width: int | None = None,
    gradient_memory: Callable[[], Tensor] | None = None,
) -> Tensor:
    """See :func:`flashi2v_kernels.qk_norm_rope.reference.qk_norm_rope`.

    ``npu_rotary_mul`` takes batch times heads below 1000 and a head size below 896.
    """
    require_tables(heads_SBhD, cos_SR, sin_SR)
    if (sum_of_squares is None) != (full_width is None):
        raise ValueError("give both sum_of_squares and full_width, or neither")
    weight_hD = weight_of_heads(heads_SBhD, weight)
    if sum_of_squares is None:
        return call(_NormAndTurn, heads_SBhD, weight_hD, cos_SR, sin_SR, eps)
    if sum_of_squares.shape != heads_SBhD.shape[:2]:
        raise ValueError(f"sums {tuple(sum_of_squares.shape)} do not fit heads {tuple(heads_SBhD.shape)}")
    return call(_NormOfSumAndTurn, heads_SBhD, weight_hD, sum_of_squares, cos_SR, sin_SR, full_width, eps)


def turn(x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Rotate with ``npu_rotary_mul``, without its gradient, which would keep the input.

    In fp32: the operator requires tables of the input's dtype, and angles in bf16 would lose five digits of eight.
    """
    tables = (table.float().repeat_interleave(2, dim=-1)[:, None, None, :] for table in (cos_SR, sin_SR))
    return torch_npu.npu_rotary_mul(x_SBhD.float(), *tables, "interleave").to(x_SBhD.dtype)


class _NormAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        normed, rstd = torch_npu.npu_rms_norm(heads.float(), weight.float(), eps)
        ctx.save_for_backward(heads, weight, rstd, cos, sin)
        return turn(normed, cos, sin).to(heads.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        heads, weight, rstd, cos, sin = ctx.saved_tensors
        gradient = turn(gradients[0].float(), cos, -sin)
        grads = torch_npu.npu_rms_norm_backward(gradient, heads.float(), weight.float(), rstd)
        return grads[0].to(heads.dtype), grads[1].to(weight.dtype), None, None, None


class _NormOfSumAndTurn(torch.autograd.Function):
    """With r = (sum/width + eps)^-1/2: y = turn(x*r*w). The sum is an input with a gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, weight: Tensor, sums: Tensor, cos: Tensor, sin: Tensor, width: int, eps: float
    ) -> Tensor:
        rstd = torch.rsqrt(sums.float()[..., None, None] / width + eps)
        ctx.save_for_backward(heads, weight, rstd, cos, sin)
        ctx.width, ctx.sum_dtype = width, sums.dtype
        return turn(heads.float() * rstd * weight.float(), cos, sin).to(heads.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        heads, weight, rstd, cos, sin = ctx.saved_tensors
        gradient = turn(gradients[0].float(), cos, -sin)
        by_normed = gradient * heads.float() * rstd
        grad_heads = (gradient * weight.float() * rstd).to(heads.dtype)
        grad_weight = by_normed.sum(dim=(0, 1)).to(weight.dtype)
        grad_rstd = (by_normed * weight.float()).sum(dim=(-2, -1))
        grad_sums = grad_rstd * rstd[..., 0, 0].square() * (-0.5 / ctx.width)
        return grad_heads, grad_weight, grad_sums.to(ctx.sum_dtype), None, None, None, None
