"""Sum and norm in one pass over the rows, in forward and in backward: four and six rows moved where two kernels and
autograd's own sum of gradients move five and nine.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashi2v_kernels import triton_launch
from flashi2v_kernels.ada_layer_norm.reference import require_rows
from flashi2v_kernels.autograd import call
from flashi2v_kernels.gate_residual.reference import require_update
from flashi2v_kernels.triton_launch import block_of, few_warps_of, runs_of, warps_of, with_unit_stride


def residual_norm(
    hidden_SBD: Tensor,
    update_SBD: Tensor,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`flashi2v_kernels.residual_norm.reference.residual_norm`; fp32 inside for every dtype."""
    require_rows(hidden_SBD, shift_BD, scale_BD)
    require_update(hidden_SBD, update_SBD, shift_BD if gate_BD is None else gate_BD)
    return call(_ResidualNorm, hidden_SBD, update_SBD, gate_BD, shift_BD, scale_BD, eps, dtype)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        update: Tensor,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        hidden, update, shift, scale = (
            with_unit_stride(hidden), with_unit_stride(update), shift.contiguous(), scale.contiguous()
        )
        gate = None if gate is None else gate.contiguous()
        (tokens, batch, width), block = hidden.shape, block_of(hidden.shape[-1])
        total = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        output = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        mean, rstd = torch.empty((2, tokens, batch), dtype=torch.float32, device=hidden.device)
        triton_launch.launch(
            residual_norm_forward, (tokens * batch,),
            hidden, update, shift if gate is None else gate, shift, scale, total, output, mean, rstd,
            hidden.stride(0), hidden.stride(1), update.stride(0), update.stride(1), batch, width, eps,
            GATED=gate is not None, BLOCK=block, num_warps=few_warps_of(block),
        )
        # without a gate the update's values are not needed
        ctx.save_for_backward(total, None if gate is None else update, gate, scale, mean, rstd)
        ctx.dtypes = update.dtype, shift.dtype
        return total, output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        total, update, gate, scale, mean, rstd = ctx.saved_tensors
        grad_total, grad_output = (with_unit_stride(gradient) for gradient in gradients)
        (tokens, batch, width), block, gated = total.shape, block_of(total.shape[-1]), gate is not None
        length, runs = runs_of(tokens)
        update_dtype, shift_dtype = ctx.dtypes
        grad_hidden = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        grad_update = torch.empty(total.shape, dtype=update_dtype, device=total.device) if gated else grad_hidden
        parts = torch.empty((3 if gated else 2, runs, batch, width), dtype=torch.float32, device=total.device)
        rows = update if gated else total
        triton_launch.launch(
            residual_norm_backward, (runs, batch),
            grad_total, grad_output, total, rows, gate if gated else scale, scale, mean, rstd, grad_hidden,
            grad_update, parts[0], parts[1], parts[-1], *grad_total.stride()[:2], *grad_output.stride()[:2],
            *rows.stride()[:2], length, tokens, batch, width,
            GATED=gated, BLOCK=block, num_warps=warps_of(block),
        )
        grad_shift, grad_scale, *grad_gate = parts.sum(dim=1)
        needs = ctx.needs_input_grad
        return (
            grad_hidden if needs[0] else None,
            grad_update.to(update_dtype) if needs[1] else None,
            grad_gate[0].to(gate.dtype) if gated and needs[2] else None,
            grad_shift.to(shift_dtype) if needs[3] else None,
            grad_scale.to(scale.dtype) if needs[4] else None,
            None,
            None,
        )


@triton.jit
def residual_norm_forward(
    x_ptr, update_ptr, gate_ptr, shift_ptr, scale_ptr, total_ptr, out_ptr, mean_ptr, rstd_ptr,
    x_token, x_sample, update_token, update_sample, batch, width, eps,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Program ``token * batch + sample`` computes that row."""
    row = tl.program_id(0)
    token, sample = (row // batch).to(tl.int64), row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = row.to(tl.int64) * width + columns
    total = tl.load(x_ptr + token * x_token + sample * x_sample + columns, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(
        update_ptr + token * update_token + sample * update_sample + columns, mask=inside, other=0.0
    ).to(tl.float32)
    if GATED:
        update *= tl.load(gate_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = (total + update).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + place, rounded, mask=inside)
    total = rounded.to(tl.float32)
    mean = tl.sum(total, axis=0) / width
    centred = tl.where(inside, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    shift = tl.load(shift_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    out = centred * rstd * (1.0 + scale) + shift
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def residual_norm_backward(
    g_total_ptr, g_ptr, total_ptr, update_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, d_update_ptr,
    part_shift_ptr, part_scale_ptr, part_gate_ptr,
    g_total_token, g_total_sample, g_token, g_sample, update_token, update_sample, length, tokens, batch, width,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Program (run, sample): rows of ``length`` tokens, and their part of the sums.

    dx is the sum's own gradient plus the norm's (see ``ada_layer_norm``), d_update = gate * dx, d_gate = sum(dx * u).
    """
    run, sample = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = 1.0 + tl.load(scale_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    part_shift = tl.zeros((BLOCK,), tl.float32)
    part_scale = tl.zeros((BLOCK,), tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
        part_gate = tl.zeros((BLOCK,), tl.float32)
    for token in range(run * length, tl.minimum((run + 1) * length, tokens)):
        at = tl.cast(token, tl.int64)
        row = at * batch + sample
        g = tl.load(g_ptr + at * g_token + sample * g_sample + columns, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, (total - tl.load(mean_ptr + row)) * rstd, 0.0)
        part_shift += g
        part_scale += g * normed
        weighted = g * factor
        mean_weighted = tl.sum(weighted, axis=0) / width
        projection = tl.sum(weighted * normed, axis=0) / width
        dx = rstd * (weighted - mean_weighted - normed * projection)
        dx += tl.load(
            g_total_ptr + at * g_total_token + sample * g_total_sample + columns, mask=inside, other=0.0
        ).to(tl.float32)
        tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if GATED:
            update = tl.load(
                update_ptr + at * update_token + sample * update_sample + columns, mask=inside, other=0.0
            ).to(tl.float32)
            part_gate += dx * update
            d_update = (dx * gate).to(d_update_ptr.dtype.element_ty)
            tl.store(d_update_ptr + row * width + columns, d_update, mask=inside)
    part = (run * batch + sample).to(tl.int64) * width + columns
    tl.store(part_shift_ptr + part, part_shift, mask=inside)
    tl.store(part_scale_ptr + part, part_scale, mask=inside)
    if GATED:
        tl.store(part_gate_ptr + part, part_gate, mask=inside)
