"""The discrepancy against the exact moments of normal distributions, and its interval's coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_flashi2v.evaluation.mmd import cubic_kernel, discrepancy

WIDTH = 6


def moments(mean: NDArray, covariance: NDArray) -> list[NDArray]:
    """E x, E x x, E x x x of a normal distribution."""
    third = np.einsum("i,j,k->ijk", mean, mean, mean)
    for order in ("ij,k->ijk", "ik,j->ijk", "jk,i->ijk"):
        third = third + np.einsum(order, covariance, mean)
    return [mean, covariance + np.outer(mean, mean), third]


def true_value(mean: NDArray, scale: float) -> float:
    """Squared discrepancy of N(0, 1) and N(mean, scale^2): the cubic kernel compares the first three moments."""
    pairs = zip(moments(np.zeros(WIDTH), np.eye(WIDTH)), moments(mean, scale**2 * np.eye(WIDTH)), strict=True)
    return sum(
        math.comb(3, order) * ((one - other) ** 2).sum() / WIDTH**order
        for order, (one, other) in enumerate(pairs, start=1)
    )


@pytest.mark.parametrize(
    ("shift", "scale", "correlation"), [(0.0, 1.0, 0.0), (0.5, 1.0, 0.8), (1.0, 1.5, 0.0), (0.0, 1.5, 0.5)]
)
def test_unbiased_and_covered(shift: float, scale: float, correlation: float) -> None:
    """Where the distributions are equal, near and far, and where pairs depend on each other."""
    rng = np.random.default_rng(7)
    mean = np.full(WIDTH, shift / math.sqrt(WIDTH))
    expected, covered, values = true_value(mean, scale), 0, []
    for _ in range(100):
        first = rng.standard_normal((80, WIDTH))
        noise = rng.standard_normal((80, WIDTH))
        second = (correlation * first + math.sqrt(1 - correlation**2) * noise) * scale + mean
        found = discrepancy(first, second, 200, rng)
        values.append(found.value)
        covered += found.low <= expected <= found.high
    assert 90 <= covered <= 99
    assert abs(np.mean(values) - expected) < 3 * np.std(values) / 10


def test_the_estimate_is_a_mean_over_pairs_of_pairs() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((5, 3)), rng.standard_normal((5, 3))

    def kernel(one: NDArray, other: NDArray) -> float:
        return float((one @ other / 3 + 1) ** 3)

    terms = [
        kernel(first[i], first[j]) + kernel(second[i], second[j])
        - kernel(first[i], second[j]) - kernel(first[j], second[i])
        for i in range(5)
        for j in range(5)
        if i != j
    ]  # fmt: skip
    assert discrepancy(first, second, 100, rng).value == pytest.approx(np.mean(terms), rel=1e-12)
    assert cubic_kernel(first, second)[1, 2] == pytest.approx(kernel(first[1], second[2]))


def test_the_interval_is_the_studentised_bootstrap_spelt_out() -> None:
    """By lists of drawn pairs instead of weights: a pair does not meet itself, however often it is drawn."""
    rng = np.random.default_rng(4)
    first, second = rng.standard_normal((7, 3)), rng.standard_normal((7, 3)) + 1
    terms = [[0.0 if i == j else _term(first, second, i, j) for j in range(7)] for i in range(7)]

    def statistic(drawn: list[int]) -> tuple[float, float]:
        met = [terms[i][j] for i in drawn for j in drawn if i != j]
        rows = [sum(terms[i][j] for j in drawn) / 7 for i in drawn]
        return sum(met) / len(met), 2 * float(np.std(rows)) / math.sqrt(7)

    value, error = statistic(list(range(7)))
    weights = np.random.default_rng(9).multinomial(7, np.full(7, 1 / 7), size=200)
    drawn = [statistic([pair for pair in range(7) for _ in range(row[pair])]) for row in weights]
    low, high = np.quantile([(one - value) / spread for one, spread in drawn if spread > 0], (0.025, 0.975))
    found = discrepancy(first, second, 200, np.random.default_rng(9))
    assert abs(low + high) > 0.1  # skewed, so that the two bounds cannot be exchanged
    expected = (value, value - high * error, value - low * error)
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-9)


def _term(first: NDArray, second: NDArray, i: int, j: int) -> float:
    pairs = ((first[i], first[j], 1), (second[i], second[j], 1), (first[i], second[j], -1), (first[j], second[i], -1))
    return sum(sign * float((one @ other / 3 + 1) ** 3) for one, other, sign in pairs)


def test_equal_samples_have_none() -> None:
    samples = np.random.default_rng(0).standard_normal((9, 4))
    found = discrepancy(samples, samples.copy(), 100, np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_few_pairs_have_finite_bounds() -> None:
    rng = np.random.default_rng(0)
    found = discrepancy(rng.standard_normal((4, 5)), rng.standard_normal((4, 5)), 1000, rng)
    assert np.isfinite([found.low, found.high]).all() and found.low <= found.high
    with pytest.raises(ValueError, match="N >= 3"):
        discrepancy(np.zeros((2, 5)), np.zeros((2, 5)), 100, rng)
