"""Compares two videos: peak signal-to-noise ratio of 8-bit frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PEAK = 255.0


def psnr_per_frame(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of every frame, ``10 log10(255^2 / mean squared error)``.

    Args:
        reference: uint8 ``[T, H, W, C]``, or one frame ``[H, W, C]``.
        other: the same shape and dtype.

    Returns:
        fp64 ``[T]`` in dB (``[1]`` for one frame); ``inf`` where two frames are equal.

    Raises:
        ValueError: the arrays are not uint8, or their shapes differ.
    """
    reference, other = np.asarray(reference), np.asarray(other)
    if reference.dtype != np.uint8 or other.dtype != np.uint8:
        raise ValueError(f"PSNR is defined here on uint8 frames, not on {reference.dtype} and {other.dtype}")
    if reference.shape != other.shape or reference.ndim not in (3, 4):
        raise ValueError(
            f"frames must have equal shapes [T, H, W, C] or [H, W, C], not {reference.shape} and {other.shape}"
        )
    if reference.ndim == 3:
        reference, other = reference[None], other[None]
    difference = reference.astype(np.float64) - other.astype(np.float64)
    mean_squared_error = np.mean(difference**2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(PEAK**2 / mean_squared_error)


def mean_psnr(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """The mean over frames of :func:`psnr_per_frame`, in dB (the usual convention for video)."""
    return float(psnr_per_frame(reference, other).mean())
