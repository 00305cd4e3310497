"""One pass in forward; one in backward, which leaves partial sums for the gate."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashi2v_kernels import triton_launch
from flashi2v_kernels.autograd import call
from flashi2v_kernels.gate_residual.reference import require_update
from flashi2v_kernels.triton_launch import block_of, runs_of, warps_of, with_unit_stride


def gate_residual(hidden_SBD: Tensor, update_SBD: Tensor, gate_BD: Tensor) -> Tensor:
    """See :func:`flashi2v_kernels.gate_residual.reference.gate_residual`; fp32 inside for every dtype."""
    require_update(hidden_SBD, update_SBD, gate_BD)
    return call(_GateResidual, hidden_SBD, update_SBD, gate_BD)


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        hidden, update, gate = with_unit_stride(hidden), with_unit_stride(update), gate.contiguous()
        (tokens, batch, width), block = hidden.shape, block_of(hidden.shape[-1])
        output = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        triton_launch.launch(
            gate_forward, (tokens * batch,),
            hidden, update, gate, output, hidden.stride(0), hidden.stride(1), update.stride(0), update.stride(1),
            batch, width, BLOCK=block, num_warps=warps_of(block),
        )
        ctx.save_for_backward(update, gate)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        update, gate = ctx.saved_tensors
        gradient = with_unit_stride(gradients[0])
        (tokens, batch, width), block = update.shape, block_of(update.shape[-1])
        length, runs = runs_of(tokens)
        grad_update = torch.empty(update.shape, dtype=update.dtype, device=update.device)
        parts = torch.empty((runs, batch, width), dtype=torch.float32, device=update.device)
        triton_launch.launch(
            gate_backward, (runs, batch),
            gradient, update, gate, grad_update, parts,
            gradient.stride(0), gradient.stride(1), update.stride(0), update.stride(1), length, tokens, batch, width,
            BLOCK=block, num_warps=warps_of(block),
        )
        needs = ctx.needs_input_grad
        return (
            gradients[0],
            grad_update if needs[1] else None,
            parts.sum(dim=0).to(gate.dtype) if needs[2] else None,
        )


@triton.jit
def gate_forward(
    x_ptr, update_ptr, gate_ptr, out_ptr, x_token, x_sample, update_token, update_sample, batch, width,
    BLOCK: tl.constexpr,
):
    """Program ``token * batch + sample`` computes that row."""
    row = tl.program_id(0)
    token, sample = (row // batch).to(tl.int64), row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + token * x_token + sample * x_sample + columns, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(
        update_ptr + token * update_token + sample * update_sample + columns, mask=inside, other=0.0
    ).to(tl.float32)
    gate = tl.load(gate_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    out = x + gate * update
    tl.store(out_ptr + row.to(tl.int64) * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(
    g_ptr, update_ptr, gate_ptr, d_update_ptr, part_ptr,
    g_token, g_sample, update_token, update_sample, length, tokens, batch, width,
    BLOCK: tl.constexpr,
):
    """Program (run, sample): rows of ``length`` tokens, and their part of the gate's sum."""
    run, sample = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + sample * width + columns, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK,), tl.float32)
    for token in range(run * length, tl.minimum((run + 1) * length, tokens)):
        at = tl.cast(token, tl.int64)
        g = tl.load(g_ptr + at * g_token + sample * g_sample + columns, mask=inside, other=0.0).to(tl.float32)
        update = tl.load(
            update_ptr + at * update_token + sample * update_sample + columns, mask=inside, other=0.0
        ).to(tl.float32)
        part += g * update
        row = at * batch + sample
        d_update = (g * gate).to(d_update_ptr.dtype.element_ty)
        tl.store(d_update_ptr + row * width + columns, d_update, mask=inside)
    tl.store(part_ptr + (run * batch + sample).to(tl.int64) * width + columns, part, mask=inside)
