"""95% intervals of means and of shares."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bootstrap_mean(values_NT: Array, resamples: int, generator: np.random.Generator) -> tuple[Array, Array, Array]:
    """Mean over images with its percentile bootstrap interval.

    Args:
        values_NT: one row an image.
        resamples: of the images.
        generator: draws them.

    Returns:
        Mean, 2.5% and 97.5% bounds, each fp64 ``[T]``.
    """
    count = len(values_NT)
    weights_RN = generator.multinomial(count, np.full(count, 1 / count), size=resamples) / count
    low, high = np.quantile(weights_RN @ values_NT, (0.025, 0.975), axis=0)
    return values_NT.mean(0), low, high


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Bounds of a share (E. Wilson, 1927), sound for few trials and for shares of 0 and 1."""
    normal = 1.959964
    share = hits / count
    centre = share + normal**2 / (2 * count)
    half = normal * math.sqrt(share * (1 - share) / count + normal**2 / (4 * count**2))
    scale = 1 + normal**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
