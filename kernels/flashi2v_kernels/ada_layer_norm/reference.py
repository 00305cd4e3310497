"""The definition of the modulated LayerNorm, left to autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def ada_layer_norm(
    hidden_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """``LN(x) * (1 + scale) + shift`` (DiT, arXiv 2212.09748), in fp32 and rounded once.

    LN has no weights of its own: ``(x - mean) / sqrt(variance + eps)`` over the last dimension, with the
    variance divided by D. A LayerNorm with weight w and bias b is the case ``scale = w - 1, shift = b``.

    Args:
        hidden_SBD: rows, [tokens, batch, width].
        shift_BD: added to every token of its sample, [batch, width].
        scale_BD: likewise, [batch, width].
        eps: added to the variance.
        dtype: of the result.
        out: memory for the result, where no gradient is wanted; what held the result before, for example.

    Returns:
        [tokens, batch, width] in ``dtype``; computed in fp32 (fp64 for fp64 rows).

    Raises:
        ValueError: the shapes do not fit each other.
    """
    require_rows(hidden_SBD, shift_BD, scale_BD)
    wide_SBD = hidden_SBD.to(torch.promote_types(hidden_SBD.dtype, torch.float32))
    centred_SBD = wide_SBD - wide_SBD.mean(dim=-1, keepdim=True)
    normed_SBD = centred_SBD * torch.rsqrt(centred_SBD.square().mean(dim=-1, keepdim=True) + eps)
    output_SBD = (normed_SBD * (1.0 + scale_BD.to(wide_SBD.dtype)) + shift_BD.to(wide_SBD.dtype)).to(dtype)
    return output_SBD if out is None else out.copy_(output_SBD)


def require_rows(hidden_SBD: Tensor, *rows_BD: Tensor) -> None:
    """Refuse shapes that would broadcast silently.

    Raises:
        ValueError: ``hidden_SBD`` is not three-dimensional, or a row is not [B, D].
    """
    for row_BD in rows_BD:
        if hidden_SBD.ndim != 3 or row_BD.shape != hidden_SBD.shape[1:]:
            raise ValueError(f"rows {tuple(row_BD.shape)} do not fit hidden {tuple(hidden_SBD.shape)}; "
                             "they must be [B, D] for [S, B, D]")
