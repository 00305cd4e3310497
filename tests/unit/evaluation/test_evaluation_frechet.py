"""The Frechet distance against closed forms and against scipy's square root of a matrix."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from megatron_flashi2v.evaluation.frechet import frechet_distance, frechet_from_moments, halves_distance


def by_scipy(first: NDArray, second: NDArray) -> float:
    gap = first.mean(0) - second.mean(0)
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    return float(gap @ gap + np.trace(one + other - 2 * np.real(sqrtm(one @ other))))


def random_covariance(rng: np.random.Generator, width: int, rank: int) -> NDArray:
    factor = rng.standard_normal((width, rank))
    return factor @ factor.T / rank


def test_closed_form_of_commuting_covariances() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    one, other, gap = rng.uniform(0, 4, 40), rng.uniform(0, 4, 40), rng.standard_normal(40)
    one[:7] = 0  # singular, as the covariance of few samples is
    expected = gap @ gap + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum()
    found = frechet_from_moments(gap, basis * one @ basis.T, np.zeros(40), basis * other @ basis.T)
    assert found == pytest.approx(expected, rel=1e-6)


def test_closed_form_of_two_dimensions() -> None:
    """tr (C1 C2)^(1/2) of 2 x 2 matrices is sqrt(tr(C1 C2) + 2 sqrt(det(C1 C2))), also where they do not commute."""
    one, other = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.4], [-0.4, 3.0]])
    product = one @ other
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 1 + 4 + np.trace(one) + np.trace(other) - 2 * root
    assert frechet_from_moments(np.array([1.0, 2.0]), one, np.zeros(2), other) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [20, 33, 200])  # fewer samples than features, about as many, and more
def test_samples_against_scipy(count: int) -> None:
    rng = np.random.default_rng(count)
    mixing = rng.standard_normal((32, 32)) / 6
    first, second = rng.standard_normal((count, 32)), rng.standard_normal((count + 3, 32)) @ mixing + 0.3
    assert frechet_distance(first, second) == pytest.approx(by_scipy(first, second), rel=1e-3)


def test_moments_and_samples_agree() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((90, 12)), 2 * rng.standard_normal((70, 12)) + 1
    moments = [part for one in (first, second) for part in (one.mean(0), np.cov(one, rowvar=False))]
    assert frechet_distance(first, second) == pytest.approx(frechet_from_moments(*moments), rel=1e-9)


@pytest.mark.parametrize(("count", "width"), [(10, 300), (300, 10)])
def test_equal_samples_have_no_distance(count: int, width: int) -> None:
    samples = 50 + 1e3 * np.random.default_rng(2).standard_normal((count, width))
    assert frechet_distance(samples, samples.copy()) == 0
    assert frechet_distance(samples, samples[::-1].copy()) == 0
    assert frechet_distance(samples, samples + 1e-3) == pytest.approx(1e-6 * width, rel=1e-2)


def test_widths_and_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="one width"):
        frechet_distance(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))


def test_halves_are_disjoint_and_show_the_bias_of_few_samples() -> None:
    rng = np.random.default_rng(3)
    references, videos = rng.standard_normal((40, 8)), rng.standard_normal((40, 8)) + 2
    found = halves_distance(videos, references, 20, np.random.default_rng(0))
    assert found.samples == 20
    assert 0 < found.references_low <= found.references <= found.references_high < found.videos_low
    # The same samples on both sides would give 0: the halves share none.
    same = halves_distance(references, references, 20, np.random.default_rng(0))
    assert same.videos == same.references == pytest.approx(found.references)
