"""Eager torch with a backward of its own, which keeps the input and one number per row, no fp32 copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.rms_norm.statistics import weight_like_tail, widened


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, sum_of_squares: Tensor | None = None, full_width: int | None = None
) -> Tensor:
    """See :func:`flashi2v_kernels.rms_norm.reference.rms_norm`."""
    if (sum_of_squares is None) != (full_width is None):
        raise ValueError("give both sum_of_squares and full_width, or neither")
    weight = weight_like_tail(x, weight, sum_of_squares)
    if sum_of_squares is None or full_width is None:
        return _RmsNorm.apply(x, weight, eps)
    return _RmsNormOfSum.apply(x, weight, sum_of_squares, full_width, eps)


def _tail(dims: int) -> tuple[int, ...]:
    return tuple(range(-dims, 0))


def _leading(x: Tensor, dims: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - dims))


def _sum_leading(x: Tensor, dims: int) -> Tensor:
    # sum(dim=()) would sum over everything
    return x.sum(dim=_leading(x, dims)) if x.ndim > dims else x


class _RmsNorm(torch.autograd.Function):
    """The whole norm on one rank. With r = (mean(x^2) + eps)^-1/2: dx = r*(gw - x * r^2 * mean(gw*x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        inverse_rms = torch.rsqrt(wide.square().mean(dim=_tail(weight.ndim), keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms * weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        gradient, normalised = widened(gradients[0]), widened(x) * inverse_rms
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_leading(gradient * normalised, weight.ndim).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = gradient * weight.to(gradient.dtype)
            projection = (weighted * normalised).mean(dim=_tail(weight.ndim), keepdim=True)
            grad_x = (inverse_rms * (weighted - normalised * projection)).to(x.dtype)
        return grad_x, grad_weight, None


class _RmsNormOfSum(torch.autograd.Function):
    """The norm from a given sum of squares, which is an input with a gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, sum_of_squares: Tensor, width: int, eps: float
    ) -> Tensor:
        wide = widened(x)
        mean_square = sum_of_squares.to(wide.dtype).view(*sum_of_squares.shape, *[1] * weight.ndim) / width
        inverse_rms = torch.rsqrt(mean_square + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.width, ctx.sum_dtype = width, sum_of_squares.dtype
        return (wide * inverse_rms * weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        gradient, wide = widened(gradients[0]), widened(x)
        weighted = gradient * weight.to(gradient.dtype)
        grad_x = grad_weight = grad_sum = None
        if ctx.needs_input_grad[0]:
            grad_x = (weighted * inverse_rms).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_leading(gradient * wide * inverse_rms, weight.ndim).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            per_row = (weighted * wide).sum(dim=_tail(weight.ndim), keepdim=True)
            grad_sum = (per_row * inverse_rms**3 * (-0.5 / ctx.width)).flatten(-weight.ndim).squeeze(-1)
            grad_sum = grad_sum.to(ctx.sum_dtype)
        return grad_x, grad_weight, grad_sum, None, None
