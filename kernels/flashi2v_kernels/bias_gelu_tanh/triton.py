"""Bias and activation in one pass; backward computes the value again and leaves partial sums for the bias."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashi2v_kernels import triton_launch
from flashi2v_kernels.autograd import call
from flashi2v_kernels.bias_gelu_tanh.reference import require_bias
from flashi2v_kernels.triton_launch import block_of, runs_of, warps_of

COLUMNS = 1024
"""Columns of one program. Rows are split: nothing is summed along them."""


def bias_gelu_tanh(x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """See :func:`flashi2v_kernels.bias_gelu_tanh.reference.bias_gelu_tanh`; fp32 inside for every dtype."""
    require_bias(x, bias)
    return call(_BiasGelu, x, bias, out)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        width = x.shape[-1]
        rows, block = x.numel() // width, min(block_of(width), COLUMNS)
        output = torch.empty_like(x) if out is None else out
        triton_launch.launch(
            gelu_forward, (rows, triton.cdiv(width, block)),
            x, x if bias is None else bias, output, width, HAS_BIAS=bias is not None, BLOCK=block,
            num_warps=warps_of(block),
        )
        ctx.save_for_backward(x, bias)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        gradient, width = gradients[0].contiguous(), x.shape[-1]
        rows, block = x.numel() // width, min(block_of(width), COLUMNS)
        length, runs = runs_of(rows)
        grad_x = torch.empty_like(x)
        parts = torch.empty((runs, width) if bias is not None else 1, dtype=torch.float32, device=x.device)
        triton_launch.launch(
            gelu_backward, (runs, triton.cdiv(width, block)),
            gradient, x, x if bias is None else bias, grad_x, parts, length, rows, width,
            HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps_of(block),
        )
        needs = ctx.needs_input_grad
        grad_bias = parts.sum(dim=0).to(bias.dtype) if bias is not None and needs[1] else None
        return grad_x if needs[0] else None, grad_bias, None


@triton.jit
def _sigmoid_of_twice(value):
    """sigmoid(2u) = (1 + tanh(u)) / 2 with gelu's u; nothing cancels, and large arguments saturate."""
    inner = 0.7978845608028654 * value * (1.0 + 0.044715 * value * value)
    return 1.0 / (1.0 + tl.exp(tl.minimum(-2.0 * inner, 80.0)))


@triton.jit
def gelu_forward(x_ptr, bias_ptr, out_ptr, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, columns)."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = value * _sigmoid_of_twice(value)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(
    g_ptr, x_ptr, bias_ptr, dx_ptr, part_ptr, length, rows, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (run, columns): with s = sigmoid(2u), d(v s)/dv = s + v * s * (1 - s) * 2 du/dv."""
    run = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    part = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(run * length, tl.minimum((run + 1) * length, rows)):
        at = tl.cast(row, tl.int64) * width + columns
        value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += bias
        s = _sigmoid_of_twice(value)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * value * value)
        dx = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32) * (s + value * s * (1.0 - s) * slope)
        part += dx
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        tl.store(part_ptr + run.to(tl.int64) * width + columns, part, mask=inside)
