"""torch's fused LayerNorm with each sample's scale and shift in the place of its weight and bias.

Backward keeps the rows in their own dtype and two numbers per row; nothing is expanded over the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.ada_layer_norm.reference import require_rows
from flashi2v_kernels.chunks import row_chunks, wide_dtype


def ada_layer_norm(
    hidden_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, *, dtype: torch.dtype
) -> Tensor:
    """See :func:`flashi2v_kernels.ada_layer_norm.reference.ada_layer_norm`."""
    require_rows(hidden_SBD, shift_BD, scale_BD)
    return _AdaLayerNorm.apply(hidden_SBD, shift_BD, scale_BD, eps, dtype)


class _AdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        wide, width = wide_dtype(hidden), hidden.shape[-1]
        factor, shift_wide = 1.0 + scale.to(wide), shift.to(wide)
        output = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        # sample first: torch reads them as if they were contiguous
        mean, rstd = torch.empty((2, hidden.shape[1], hidden.shape[0], 1), dtype=wide, device=hidden.device)
        for rows in row_chunks(hidden):
            for b in range(hidden.shape[1]):
                output[rows, b], mean[b, rows], rstd[b, rows] = torch.native_layer_norm(
                    hidden[rows, b].to(wide), (width,), factor[b], shift_wide[b], eps
                )
        ctx.save_for_backward(hidden, scale, mean, rstd)
        ctx.shift_dtype = shift.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden, scale, mean, rstd = ctx.saved_tensors
        wide, width = wide_dtype(hidden), hidden.shape[-1]
        needs_hidden, needs_shift, needs_scale = ctx.needs_input_grad[:3]
        factor = 1.0 + scale.to(wide)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_shift, grad_scale = torch.zeros((2, *scale.shape), dtype=wide, device=hidden.device)
        for rows in row_chunks(hidden):
            for b in range(hidden.shape[1]):
                part, part_scale, part_shift = torch.ops.aten.native_layer_norm_backward(
                    gradients[0][rows, b].to(wide), hidden[rows, b].to(wide), (width,), mean[b, rows],
                    rstd[b, rows], factor[b], factor[b],  # the bias' value plays no part
                    (needs_hidden, needs_scale, needs_shift),
                )
                if grad_hidden is not None:
                    grad_hidden[rows, b] = part
                if needs_scale:
                    grad_scale[b] += part_scale
                if needs_shift:
                    grad_shift[b] += part_shift
        return (
            grad_hidden,
            grad_shift.to(ctx.shift_dtype) if needs_shift else None,
            grad_scale.to(scale.dtype) if needs_scale else None,
            None,
            None,
        )
