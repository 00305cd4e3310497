"""The definition of the gated residual, left to autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_residual(hidden_SBD: Tensor, update_SBD: Tensor, gate_BD: Tensor) -> Tensor:
    """``x + gate * update`` (DiT, arXiv 2212.09748), in fp32 and rounded once to the residual stream's dtype.

    Args:
        hidden_SBD: residual stream, [tokens, batch, width].
        update_SBD: a layer's update, same shape, any float dtype.
        gate_BD: weight of every channel of the update, [batch, width].

    Returns:
        the shape and dtype of ``hidden_SBD``; computed in fp32 (fp64 for an fp64 residual stream).

    Raises:
        ValueError: the shapes do not fit each other.
    """
    require_update(hidden_SBD, update_SBD, gate_BD)
    wide = torch.promote_types(hidden_SBD.dtype, torch.float32)
    return (hidden_SBD.to(wide) + gate_BD.to(wide) * update_SBD.to(wide)).to(hidden_SBD.dtype)


def require_update(hidden_SBD: Tensor, update_SBD: Tensor, gate_BD: Tensor) -> None:
    """Refuse shapes that would broadcast silently.

    Raises:
        ValueError: the update is not of the residual stream's shape [S, B, D], or the gate is not [B, D].
    """
    shape = hidden_SBD.shape
    if hidden_SBD.ndim != 3 or update_SBD.shape != shape or gate_BD.shape != shape[1:]:
        raise ValueError(
            f"hidden {tuple(shape)}, update {tuple(update_SBD.shape)} and gate {tuple(gate_BD.shape)} must be "
            "[S, B, D], [S, B, D] and [B, D]"
        )
