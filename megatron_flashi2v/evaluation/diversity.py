"""Measures how videos of one image differ between seeds.

Shapes: S seeds, T frames, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pixel_diversity(videos_THWC: Sequence[torch.Tensor]) -> Array:
    """Root of the mean squared difference between two seeds, frame by frame, over all pairs of seeds.

    Args:
        videos_THWC: uint8, at least two, of one shape.

    Returns:
        fp64 ``[T]`` in 8-bit levels.
    """
    squares = [
        torch.stack([(a.float() - b.float()).square().mean() for a, b in zip(one, other, strict=True)])
        for one, other in itertools.combinations(videos_THWC, 2)
    ]
    return torch.stack(squares).mean(0).sqrt().double().cpu().numpy()


def mean_distance(features_SD: Array) -> float:
    """Mean Euclidean distance between two different rows."""
    gram = features_SD @ features_SD.T
    squares = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    above = np.triu_indices(len(features_SD), k=1)
    return float(np.sqrt(np.maximum(squares[above], 0)).mean())
