"""One pass over the rows in forward and one in backward, which leaves partial sums for scale and shift."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashi2v_kernels import triton_launch
from flashi2v_kernels.ada_layer_norm.reference import require_rows
from flashi2v_kernels.autograd import call
from flashi2v_kernels.triton_launch import block_of, few_warps_of, runs_of, warps_of, with_unit_stride


def ada_layer_norm(
    hidden_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """See :func:`flashi2v_kernels.ada_layer_norm.reference.ada_layer_norm`; fp32 inside for every dtype."""
    require_rows(hidden_SBD, shift_BD, scale_BD)
    return call(_AdaLayerNorm, hidden_SBD, shift_BD, scale_BD, eps, dtype, out)


class _AdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        hidden, shift, scale = with_unit_stride(hidden), shift.contiguous(), scale.contiguous()
        (tokens, batch, width), block = hidden.shape, block_of(hidden.shape[-1])
        output = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if out is None else out
        mean, rstd = torch.empty((2, tokens, batch), dtype=torch.float32, device=hidden.device)
        triton_launch.launch(
            norm_forward, (tokens * batch,),
            hidden, shift, scale, output, mean, rstd, hidden.stride(0), hidden.stride(1), batch, width, eps,
            BLOCK=block, num_warps=few_warps_of(block),
        )
        ctx.save_for_backward(hidden, scale, mean, rstd)
        ctx.shift_dtype = shift.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden, scale, mean, rstd = ctx.saved_tensors
        gradient = with_unit_stride(gradients[0])
        (tokens, batch, width), block = hidden.shape, block_of(hidden.shape[-1])
        length, runs = runs_of(tokens)
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        parts = torch.empty((2, runs, batch, width), dtype=torch.float32, device=hidden.device)
        triton_launch.launch(
            norm_backward, (runs, batch),
            gradient, hidden, scale, mean, rstd, grad_hidden, *parts,
            gradient.stride(0), gradient.stride(1), hidden.stride(0), hidden.stride(1), length, tokens, batch, width,
            BLOCK=block, num_warps=warps_of(block),
        )
        grad_shift, grad_scale = parts.sum(dim=1)
        needs = ctx.needs_input_grad
        return (
            grad_hidden if needs[0] else None,
            grad_shift.to(ctx.shift_dtype) if needs[1] else None,
            grad_scale.to(scale.dtype) if needs[2] else None,
            *[None] * 3,
        )


@triton.jit
def norm_forward(
    x_ptr, shift_ptr, scale_ptr, out_ptr, mean_ptr, rstd_ptr, x_token, x_sample, batch, width, eps,
    BLOCK: tl.constexpr,
):
    """Program ``token * batch + sample`` computes that row."""
    row = tl.program_id(0)
    token, sample = (row // batch).to(tl.int64), row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + token * x_token + sample * x_sample + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    shift = tl.load(shift_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    out = centred * rstd * (1.0 + scale) + shift
    tl.store(out_ptr + row.to(tl.int64) * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def norm_backward(
    g_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, part_shift_ptr, part_scale_ptr,
    g_token, g_sample, x_token, x_sample, length, tokens, batch, width,
    BLOCK: tl.constexpr,
):
    """Program (run, sample): rows of ``length`` tokens, and their part of the sums.

    With n = (x - mean) * rstd and w = g * (1 + scale): dx = rstd * (w - mean(w) - n * mean(w * n)).
    """
    run, sample = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = 1.0 + tl.load(scale_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    part_shift = tl.zeros((BLOCK,), tl.float32)
    part_scale = tl.zeros((BLOCK,), tl.float32)
    for token in range(run * length, tl.minimum((run + 1) * length, tokens)):
        at = tl.cast(token, tl.int64)
        row = at * batch + sample
        g = tl.load(g_ptr + at * g_token + sample * g_sample + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at * x_token + sample * x_sample + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        part_shift += g
        part_scale += g * normed
        weighted = g * factor
        mean_weighted = tl.sum(weighted, axis=0) / width
        projection = tl.sum(weighted * normed, axis=0) / width
        dx = rstd * (weighted - mean_weighted - normed * projection)
        tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    part = (run * batch + sample).to(tl.int64) * width + columns
    tl.store(part_shift_ptr + part, part_shift, mask=inside)
    tl.store(part_scale_ptr + part, part_scale, mask=inside)
