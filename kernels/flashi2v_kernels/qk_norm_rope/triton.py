"""The norm's Triton kernels with the rotation switched on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flashi2v_kernels.qk_norm_rope.reference import weight_of_heads
from flashi2v_kernels.qk_norm_rope.tables import require_tables
from flashi2v_kernels.rms_norm.triton import norm_and_turn


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
    """See :func:`flashi2v_kernels.qk_norm_rope.reference.qk_norm_rope`; fp32 inside for every dtype."""
    require_tables(heads_SBhD, cos_SR, sin_SR)
    weight_hD = weight_of_heads(heads_SBhD, weight)
    return norm_and_turn(
        heads_SBhD, weight_hD, (cos_SR, sin_SR), eps, sum_of_squares, full_width, gradient_memory
    )
