"""The reference, compiled by torch."""

from __future__ import annotations

from torch import Tensor

from flashi2v_kernels.compiled import compiled
from flashi2v_kernels.rms_norm import reference
from flashi2v_kernels.rms_norm.statistics import weight_like_tail


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, sum_of_squares: Tensor | None = None, full_width: int | None = None
) -> Tensor:
    """See :func:`flashi2v_kernels.rms_norm.reference.rms_norm`."""
    if (sum_of_squares is None) != (full_width is None):  # torch would wrap an error that is raised inside
        raise ValueError("give both sum_of_squares and full_width, or neither")
    weight = weight_like_tail(x, weight, sum_of_squares)
    return compiled(reference.rms_norm)(x, weight, eps, sum_of_squares, full_width)
