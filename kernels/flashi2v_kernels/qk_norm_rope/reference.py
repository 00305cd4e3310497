"""The definition of queries' and keys' way from projection to attention: norm over the full width, then rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from flashi2v_kernels.rms_norm.reference import rms_norm
from flashi2v_kernels.rope3d.reference import apply_rope
from flashi2v_kernels.rope3d.tables import require_tables


def qk_norm_rope(
    heads_SBhD: Tensor,
    weight: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    eps: float,
    *,
    sum_of_squares: Tensor | None = None,
    full_width: int | None = None,
) -> Tensor:
    """RMS norm over all heads and their channels, then interleaved rotation; rounded once, after both.

    Args:
        heads_SBhD: a rank's queries or keys, [tokens, batch, heads, head size], any strides.
        weight: [heads * head size] or [heads, head size], any float dtype.
        cos_SR: cosines of :func:`~flashi2v_kernels.rope3d.tables.rope_tables`, [tokens, head size / 2].
        sin_SR: sines, same shape. The tables get no gradient.
        eps: added to the mean square.
        sum_of_squares: [tokens, batch] over the heads of all ranks, where a rank holds some of them; see
            :func:`flashi2v_kernels.rms_norm.reference.rms_norm`.
        full_width: numbers that went into ``sum_of_squares``.

    Returns:
        the shape and dtype of ``heads_SBhD``; computed in fp32 (fp64 for fp64).

    Raises:
        ValueError: weight, sums or tables do not fit.
    """
    require_tables(heads_SBhD, cos_SR, sin_SR)
    wide = heads_SBhD.to(torch.promote_types(heads_SBhD.dtype, torch.float32))
    normed = rms_norm(wide, weight_of_heads(heads_SBhD, weight), eps, sum_of_squares, full_width)
    return apply_rope(normed, cos_SR, sin_SR).to(heads_SBhD.dtype)


def weight_of_heads(heads_SBhD: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight as [heads, head size].

    Raises:
        ValueError: it has another number of elements.
    """
    heads, size = heads_SBhD.shape[-2:]
    if weight.numel() != heads * size:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit heads {tuple(heads_SBhD.shape)}")
    return weight.view(heads, size)
