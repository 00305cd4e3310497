"""The definition of the residual sum and the norm that reads it, left to autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from flashi2v_kernels.ada_layer_norm.reference import ada_layer_norm
from flashi2v_kernels.gate_residual.reference import gate_residual


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
    """``y = x + gate * update`` and ``LN(y) * (1 + scale) + shift``, which reads y as it was rounded.

    Args:
        hidden_SBD: residual stream, [tokens, batch, width].
        update_SBD: a layer's update, same shape, any float dtype.
        gate_BD: weight of every channel of the update, [batch, width]; None for 1.
        shift_BD: of the norm, see :func:`flashi2v_kernels.ada_layer_norm.reference.ada_layer_norm`.
        scale_BD: likewise.
        eps: added to the variance.
        dtype: of the norm's result.

    Returns:
        the residual stream in its shape and dtype, and the norm's result, same shape, in ``dtype``.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    row_BD = torch.ones_like(shift_BD) if gate_BD is None else gate_BD
    sum_SBD = gate_residual(hidden_SBD, update_SBD, row_BD)
    return sum_SBD, ada_layer_norm(sum_SBD, shift_BD, scale_BD, eps, dtype=dtype)
