"""torch's fused LayerNorm, with each sample's scale and shift as its weight and bias.

Backward keeps the rows in their own dtype and two numbers per row; nothing is expanded over the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.ada_layer_norm.reference import require_rows
from flashi2v_kernels.autograd import call
from flashi2v_kernels.chunks import wide_dtype


def ada_layer_norm(
    hidden_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """See :func:`flashi2v_kernels.ada_layer_norm.reference.ada_layer_norm`."""
    require_rows(hidden_SBD, shift_BD, scale_BD)
    output_SBD = call(_AdaLayerNorm, hidden_SBD, shift_BD, scale_BD, eps, dtype)
    return output_SBD if out is None else out.copy_(output_SBD)


class _AdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        wide, width = wide_dtype(hidden), hidden.shape[-1:]
        factor, shift_wide = 1.0 + scale.to(wide), shift.to(wide)
        # on CPUs the kernel takes 16-bit rows with wide weights, and computes in fp32
        rows = hidden if hidden.device.type == "cpu" and hidden.dtype == dtype else hidden.to(wide)
        samples = [
            torch.native_layer_norm(rows[:, b], width, factor[b], shift_wide[b], eps)
            for b in range(hidden.shape[1])
        ]
        # one tensor per sample: torch's backward assumes contiguous statistics
        ctx.save_for_backward(hidden, scale, *(part for _, *statistics in samples for part in statistics))
        ctx.shift_dtype = shift.dtype
        return _stacked([output for output, _, _ in samples]).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden, scale, *statistics = ctx.saved_tensors
        wide, width = wide_dtype(hidden), hidden.shape[-1:]
        # wide rows here: from 16-bit ones torch's kernel sums the gradients of scale and shift in 16 bits
        factor, rows, gradient = 1.0 + scale.to(wide), hidden.to(wide), gradients[0].to(wide)
        needs_hidden, needs_shift, needs_scale = ctx.needs_input_grad[:3]
        samples = [
            torch.ops.aten.native_layer_norm_backward(
                gradient[:, b], rows[:, b], width, mean, rstd, factor[b],
                factor[b],  # stands for the bias, whose values backward does not read
                (needs_hidden, needs_scale, needs_shift),
            )
            for b, (mean, rstd) in enumerate(zip(statistics[::2], statistics[1::2], strict=True))
        ]
        return (
            _stacked([part for part, _, _ in samples]).to(hidden.dtype) if needs_hidden else None,
            torch.stack([part for _, _, part in samples]).to(ctx.shift_dtype) if needs_shift else None,
            torch.stack([part for _, part, _ in samples]).to(scale.dtype) if needs_scale else None,
            None,
            None,
        )


def _stacked(samples: list[Tensor]) -> Tensor:
    """[S, B, D] of B times [S, D], without a copy for one sample."""
    return samples[0].unsqueeze(1) if len(samples) == 1 else torch.stack(samples, dim=1)
