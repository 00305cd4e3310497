"""Frechet distance between two sets of features, each taken for a normal distribution.

``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``: D. Dowson, B. Landau, "The Frechet distance between multivariate normal
distributions", 1982; for features of videos T. Unterthiner et al., arXiv 1812.01717. With ``Ci = Li Li^T``, the trace
of the root is the sum of the singular values of ``L1^T L2``, which needs no square root of a matrix and stays exact
where the covariances are singular.

Shapes: N samples, D features. All computation is in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class HalvesDistance:
    """Distances between halves, over random halvings.

    Attributes:
        samples: on each side.
        videos: mean distance of one half's videos to the other half's references.
        videos_low: 2.5% quantile over the halvings.
        videos_high: 97.5% quantile.
        references: mean distance of one half's references to the other half's: what sampling alone gives.
        references_low: likewise.
        references_high: likewise.
    """

    samples: int
    videos: float
    videos_low: float
    videos_high: float
    references: float
    references_low: float
    references_high: float


def frechet_distance(first_ND: Array, second_ND: Array) -> float:
    """The distance between two samples, with their unbiased covariances.

    The estimate is biased upward, the more the fewer samples there are.

    Raises:
        ValueError: fewer than two samples on a side, or features of different widths.
    """
    if first_ND.ndim != 2 or second_ND.ndim != 2 or first_ND.shape[1] != second_ND.shape[1]:
        raise ValueError(f"features must be [N, D] of one width, not {first_ND.shape} and {second_ND.shape}")
    if min(len(first_ND), len(second_ND)) < 2:
        raise ValueError("a covariance takes at least two samples")
    return _distance(first_ND.mean(0), _factor_of(first_ND), second_ND.mean(0), _factor_of(second_ND))


def frechet_from_moments(first_mean_D: Array, first_DD: Array, second_mean_D: Array, second_DD: Array) -> float:
    """The distance between two normal distributions of the given means and covariances."""
    return _distance(first_mean_D, _root(first_DD), second_mean_D, _root(second_DD))


def halves_distance(
    videos_ND: Array, references_ND: Array, splits: int, generator: np.random.Generator
) -> HalvesDistance:
    """The distance at half the samples, to videos and between references alike.

    Args:
        videos_ND: sample by sample the counterparts of ``references_ND``, at least four.
        references_ND: of the same shape.
        splits: random halvings.
        generator: draws them.
    """
    count = len(references_ND) // 2
    found = np.array(
        [
            [frechet_distance(side_ND[one], references_ND[other]) for side_ND in (videos_ND, references_ND)]
            for one, other in _halvings(len(references_ND), splits, generator)
        ]
    )
    (videos_low, references_low), (videos_high, references_high) = np.quantile(found, (0.025, 0.975), axis=0)
    return HalvesDistance(
        samples=count,
        videos=float(found[:, 0].mean()),
        videos_low=float(videos_low),
        videos_high=float(videos_high),
        references=float(found[:, 1].mean()),
        references_low=float(references_low),
        references_high=float(references_high),
    )


def _halvings(
    count: int, splits: int, generator: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    half = count // 2
    for _ in range(splits):
        order = generator.permutation(count)
        yield order[:half], order[half : 2 * half]


def _distance(first_mean_D: Array, first_factor: Array, second_mean_D: Array, second_factor: Array) -> float:
    """From means, and factors L with ``C = L L^T``, of any number of columns."""
    gap = first_mean_D - second_mean_D
    traces = float((first_factor**2).sum() + (second_factor**2).sum())
    root_trace = float(np.linalg.svd(first_factor.T @ second_factor, compute_uv=False).sum())
    distance = float(gap @ gap) + traces - 2 * root_trace
    # The traces' difference carries their rounding; what is smaller than that is no distance.
    resolution = len(gap) * np.finfo(np.float64).eps * traces
    return distance if distance > resolution else 0.0


def _factor_of(samples_ND: Array) -> Array:
    """A factor of the samples' covariance, with at most D columns."""
    centred_ND = (samples_ND - samples_ND.mean(0)) / np.sqrt(len(samples_ND) - 1)
    if len(samples_ND) > samples_ND.shape[1]:
        centred_ND = np.linalg.qr(centred_ND, mode="r")
    return centred_ND.T


def _root(covariance_DD: Array) -> Array:
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    rounding = len(values_D) * np.finfo(np.float64).eps * max(values_D.max(), 0.0)
    return vectors_DD * np.sqrt(np.where(values_D > rounding, values_D, 0.0))
