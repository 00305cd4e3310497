"""Maximum mean discrepancy with the cubic kernel of the Kernel Inception Distance, unbiased at any sample size.

A. Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, lemma 6; the kernel ``(x . y / D + 1)^3`` is that of
M. Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401. Videos and references come in pairs that share their
first frame, so the U-statistic runs over pairs and leaves out every term within one pair: it is unbiased for dependent
pairs too, and 0 for equal folders.

Shapes: N pairs, D features, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Discrepancy:
    """A squared discrepancy with its 95% interval.

    Attributes:
        value: unbiased, hence below 0 at times.
        low: 2.5% bound.
        high: 97.5% bound.
    """

    value: float
    low: float
    high: float


def discrepancy(first_ND: Array, second_ND: Array, resamples: int, generator: np.random.Generator) -> Discrepancy:
    """The squared discrepancy of paired samples, and a studentised bootstrap interval over pairs.

    The interval is that of B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", section 12.5: the percentile
    interval is far too wide where the two distributions are near, and too short where they are far.

    Args:
        first_ND: features; row by row the counterparts of ``second_ND``.
        second_ND: of the same shape.
        resamples: of the bootstrap.
        generator: draws them.

    Raises:
        ValueError: shapes differ, or there are fewer than three pairs.
    """
    if first_ND.shape != second_ND.shape or first_ND.ndim != 2 or len(first_ND) < 3:
        raise ValueError(f"features must be two [N >= 3, D] of one shape, not {first_ND.shape} and {second_ND.shape}")
    terms_NN = pair_terms(first_ND, second_ND)
    count = len(terms_NN)
    weights_RN = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    value, error = (part[0] for part in _weighted(terms_NN, np.ones((1, count))))
    values_R, errors_R = _weighted(terms_NN, weights_RN)
    usable_R = errors_R > 0
    if error == 0 or not usable_R.any():
        return Discrepancy(value=float(value), low=float(value), high=float(value))
    low, high = np.quantile((values_R[usable_R] - value) / errors_R[usable_R], (0.025, 0.975))
    return Discrepancy(value=float(value), low=float(value - high * error), high=float(value - low * error))


def pair_terms(first_ND: Array, second_ND: Array) -> Array:
    """``k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)``, and 0 where i = j: ``[N, N]``."""
    cross_NN = cubic_kernel(first_ND, second_ND)
    terms_NN = cubic_kernel(first_ND, first_ND) + cubic_kernel(second_ND, second_ND) - cross_NN - cross_NN.T
    np.fill_diagonal(terms_NN, 0.0)
    return terms_NN


def cubic_kernel(first_ND: Array, second_MD: Array) -> Array:
    """``(x . y / D + 1)^3`` of all pairs: ``[N, M]``."""
    return (first_ND @ second_MD.T / first_ND.shape[1] + 1) ** 3


def _weighted(terms_NN: Array, weights_RN: Array) -> tuple[Array, Array]:
    """The statistic and its standard error, with every pair counted as often as its weight says.

    A pair drawn twice does not meet itself: such terms would be biased upward.
    """
    count = len(terms_NN)
    rows_RN = weights_RN @ terms_NN
    meetings_R = count**2 - (weights_RN**2).sum(1)
    # A resample of one pair alone has no meeting; it has no spread either, and is left out for that.
    values_R = (rows_RN * weights_RN).sum(1) / np.maximum(meetings_R, 1)
    means_RN = rows_RN / count
    centred_RN = means_RN - (means_RN * weights_RN).sum(1, keepdims=True) / count
    # A U-statistic of pairs varies as twice the mean of its rows.
    errors_R = 2 * np.sqrt((weights_RN * centred_RN**2).sum(1)) / count
    return values_R, errors_R
