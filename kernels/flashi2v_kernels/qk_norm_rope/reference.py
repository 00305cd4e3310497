"""The definition of the norm and rotation of queries and keys, between their projection and attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashi2v_kernels.qk_norm_rope.tables import require_tables
from flashi2v_kernels.rms_norm.reference import rms_norm


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
    """RMS norm over all heads and their channels, then interleaved rotation; rounded once, after both.

    Args:
        heads_SBhD: a rank's queries or keys, [tokens, batch, heads, head size], any strides.
        weight: [heads * head size] or [heads, head size], any float dtype.
        cos_SR: cosines of :func:`~flashi2v_kernels.qk_norm_rope.tables.rope_tables`, [tokens, head size / 2].
        sin_SR: sines, same shape. The tables get no gradient.
        eps: added to the mean square.
        sum_of_squares: [tokens, batch] over the heads of all ranks, where a rank holds some of them; see
            :func:`flashi2v_kernels.rms_norm.reference.rms_norm`.
        full_width: numbers that went into ``sum_of_squares``.
        gradient_memory: gives, in backward, memory for the gradient of ``heads_SBhD``, of any strides but 1 along the
            channels. An implementation whose backward can write to it returns that very tensor as the gradient;
            others leave it alone.

    Returns:
        the shape and dtype of ``heads_SBhD``; computed in fp32 (fp64 for fp64).

    Raises:
        ValueError: weight, sums or tables do not fit.
    """
    require_tables(heads_SBhD, cos_SR, sin_SR)
    wide = heads_SBhD.to(torch.promote_types(heads_SBhD.dtype, torch.float32))
    normed = rms_norm(wide, weight_of_heads(heads_SBhD, weight), eps, sum_of_squares, full_width)
    return apply_rope(normed, cos_SR, sin_SR).to(heads_SBhD.dtype)


def apply_rope(x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Turn channels (2j, 2j+1) of token s by the angle (s, j): ``(a + ib) * (cos + i sin)``.

    Args:
        x_SBhD: queries or keys, [tokens, batch, heads, head size], any strides.
        cos_SR: cosines, as for :func:`qk_norm_rope`.
        sin_SR: sines.

    Returns:
        the shape and dtype of ``x_SBhD``; computed in fp32 (fp64 for fp64) and rounded once.
    """
    dtype = torch.promote_types(x_SBhD.dtype, torch.float32)
    cos_S11R, sin_S11R = (table.to(dtype)[:, None, None, :] for table in (cos_SR, sin_SR))
    real, imaginary = x_SBhD.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = [real * cos_S11R - imaginary * sin_S11R, real * sin_S11R + imaginary * cos_S11R]
    return torch.stack(turned, dim=-1).flatten(-2).to(x_SBhD.dtype)


def weight_of_heads(heads_SBhD: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight as [heads, head size].

    Raises:
        ValueError: it has another number of elements.
    """
    heads, size = heads_SBhD.shape[-2:]
    if weight.numel() != heads * size:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit heads {tuple(heads_SBhD.shape)}")
    return weight.view(heads, size)
