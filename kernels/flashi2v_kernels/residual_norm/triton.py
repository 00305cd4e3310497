"""The Triton kernels of the two operators one after the other; a sum without a gate is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from flashi2v_kernels.ada_layer_norm.triton import ada_layer_norm
from flashi2v_kernels.gate_residual.reference import require_update
from flashi2v_kernels.gate_residual.triton import gate_residual


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
    require_update(hidden_SBD, update_SBD, shift_BD if gate_BD is None else gate_BD)
    if gate_BD is not None:
        sum_SBD = gate_residual(hidden_SBD, update_SBD, gate_BD)
    else:
        sum_SBD = (hidden_SBD + update_SBD).to(hidden_SBD.dtype)
    return sum_SBD, ada_layer_norm(sum_SBD, shift_BD, scale_BD, eps, dtype=dtype)
