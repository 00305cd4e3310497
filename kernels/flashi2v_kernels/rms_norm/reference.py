"""The definition of the norm, left to autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from flashi2v_kernels.rms_norm.statistics import weight_like_tail


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, sum_of_squares: Tensor | None = None, full_width: int | None = None
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, statistics and product in fp32, rounded once.

    Wan rounds the normalised value to the input's dtype before it multiplies by the weight; rounding once is
    closer to the true value, and is the same in fp32.

    Args:
        x: [..., *tail], any strides; the norm runs over ``tail``, e.g. (heads, head size).
        weight: in ``tail``'s shape or as one row, any float dtype.
        eps: added to the mean square.
        sum_of_squares: when the normalised width is spread over ranks, the sum over all of them of
            :func:`~flashi2v_kernels.rms_norm.statistics.local_sum_of_squares`, [...] in fp32; gradients flow
            back through it.
        full_width: numbers that went into ``sum_of_squares``; the weight's size when None.

    Returns:
        the shape and dtype of ``x``.

    Raises:
        ValueError: the weight or the sums do not fit ``x``, or only one of ``sum_of_squares`` and
            ``full_width`` is given.
    """
    if (sum_of_squares is None) != (full_width is None):
        raise ValueError("give both sum_of_squares and full_width, or neither")
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = weight_like_tail(x, weight, sum_of_squares)
    if sum_of_squares is None or full_width is None:
        sum_of_squares = x.to(dtype).square().sum(dim=tuple(range(-weight.ndim, 0)))
        full_width = weight.numel()
    mean_square = sum_of_squares.to(dtype).view(*sum_of_squares.shape, *[1] * weight.ndim) / full_width
    return (x.to(dtype) * torch.rsqrt(mean_square + eps) * weight.to(dtype)).to(x.dtype)
