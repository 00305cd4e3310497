"""The reference, compiled by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from flashi2v_kernels.ada_layer_norm.reference import require_rows
from flashi2v_kernels.compiled import compiled
from flashi2v_kernels.gate_residual.reference import require_update
from flashi2v_kernels.residual_norm import reference


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
    """See :func:`flashi2v_kernels.residual_norm.reference.residual_norm`."""
    require_rows(hidden_SBD, shift_BD, scale_BD)  # torch would wrap an error that is raised inside
    require_update(hidden_SBD, update_SBD, shift_BD if gate_BD is None else gate_BD)
    return compiled(reference.residual_norm)(hidden_SBD, update_SBD, gate_BD, shift_BD, scale_BD, eps, dtype=dtype)
