"""The reference, compiled by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from flashi2v_kernels.ada_layer_norm import reference
from flashi2v_kernels.compiled import compiled


def ada_layer_norm(
    hidden_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """See :func:`flashi2v_kernels.ada_layer_norm.reference.ada_layer_norm`."""
    reference.require_rows(hidden_SBD, shift_BD, scale_BD)  # torch would wrap an error that is raised inside
    return compiled(reference.ada_layer_norm)(hidden_SBD, shift_BD, scale_BD, eps, dtype=dtype, out=out)
