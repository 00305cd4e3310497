"""The definition of the rotation: pairs of channels as complex numbers' real and imaginary parts."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x_SBhD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Turn channels (2j, 2j+1) of token s by the angle (s, j): ``(a + ib) * (cos + i sin)``.

    Args:
        x_SBhD: queries or keys, [tokens, batch, heads, head size], any strides.
        cos_SR: cosines of :func:`~flashi2v_kernels.rope3d.tables.rope_tables`, [tokens, head size / 2].
        sin_SR: sines, same shape.

    Returns:
        the shape and dtype of ``x_SBhD``; computed in fp32 (fp64 for fp64) and rounded once. The tables get
        no gradient.
    """
    dtype = torch.promote_types(x_SBhD.dtype, torch.float32)
    cos_S11R, sin_S11R = (table.to(dtype)[:, None, None, :] for table in (cos_SR, sin_SR))
    real, imaginary = x_SBhD.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = [real * cos_S11R - imaginary * sin_S11R, real * sin_S11R + imaginary * cos_S11R]
    return torch.stack(turned, dim=-1).flatten(-2).to(x_SBhD.dtype)
