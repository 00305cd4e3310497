"""The reference, compiled by torch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flashi2v_kernels.compiled import compiled
from flashi2v_kernels.qk_norm_rope import reference
from flashi2v_kernels.qk_norm_rope.tables import require_tables
from flashi2v_kernels.rms_norm.statistics import weight_like_tail


def qk_norm_rope(
    heads_SBhD: Tensor,
    weight: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    eps: float,
    *,
    sum_of_squares: Tensor | None = None,
    full_width: int | None = None,
    gradient_memory: Callable[[], Tensor] | None = None,
) -> Tensor:
    """See :func:`flashi2v_kernels.qk_norm_rope.reference.qk_norm_rope`."""
    require_tables(heads_SBhD, cos_SR, sin_SR)  # torch would wrap an error that is raised inside
    if (sum_of_squares is None) != (full_width is None):
        raise ValueError("give both sum_of_squares and full_width, or neither")
    weight = weight_like_tail(heads_SBhD, reference.weight_of_heads(heads_SBhD, weight), sum_of_squares)
    return compiled(reference.qk_norm_rope)(
        heads_SBhD, weight, cos_SR, sin_SR, eps, sum_of_squares=sum_of_squares, full_width=full_width
    )
