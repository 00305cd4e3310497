"""Eager torch that keeps the update in its own dtype and the gate's [B, D], and sums the gate's gradient in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.autograd import call
from flashi2v_kernels.chunks import row_chunks, wide_dtype
from flashi2v_kernels.gate_residual.reference import require_update


def gate_residual(hidden_SBD: Tensor, update_SBD: Tensor, gate_BD: Tensor) -> Tensor:
    """See :func:`flashi2v_kernels.gate_residual.reference.gate_residual`."""
    require_update(hidden_SBD, update_SBD, gate_BD)
    return call(_GateResidual, hidden_SBD, update_SBD, gate_BD)


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate)
        factor = gate.to(wide_dtype(hidden))  # a row in fp32 promotes the sum
        output = torch.empty_like(hidden)
        for rows in row_chunks(hidden):
            torch.addcmul(hidden[rows], update[rows], factor, out=output[rows])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,), (update, gate) = gradients, ctx.saved_tensors
        wide = wide_dtype(gradient)
        factor = gate.to(wide)
        grad_update = torch.empty_like(update) if ctx.needs_input_grad[1] else None
        grad_gate = torch.zeros(gate.shape, dtype=wide, device=gate.device) if ctx.needs_input_grad[2] else None
        for rows in row_chunks(gradient):
            if grad_update is not None:
                torch.mul(gradient[rows], factor, out=grad_update[rows])
            if grad_gate is not None:
                grad_gate += (gradient[rows].to(wide) * update[rows]).sum(dim=0)
        return gradient, grad_update, None if grad_gate is None else grad_gate.to(gate.dtype)
