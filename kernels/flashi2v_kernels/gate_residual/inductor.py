"""The reference, compiled by torch."""

from __future__ import annotations

from torch import Tensor

from flashi2v_kernels.compiled import compiled
from flashi2v_kernels.gate_residual import reference


def gate_residual(hidden_SBD: Tensor, update_SBD: Tensor, gate_BD: Tensor) -> Tensor:
    """See :func:`flashi2v_kernels.gate_residual.reference.gate_residual`."""
    reference.require_update(hidden_SBD, update_SBD, gate_BD)  # torch would wrap an error that is raised inside
    return compiled(reference.gate_residual)(hidden_SBD, update_SBD, gate_BD)
