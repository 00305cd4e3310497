"""Fidelity, intervals and diversity against scikit-image, exact binomials and hand computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.moving_videos import moving_video
from scipy.stats import binomtest
from skimage.metrics import structural_similarity

from megatron_flashi2v.evaluation.diversity import mean_distance, pixel_diversity
from megatron_flashi2v.evaluation.fidelity import PSNR_CEILING, psnr_to_image, ssim_to_image
from megatron_flashi2v.evaluation.intervals import bootstrap_mean, wilson


def test_ssim_equals_scikit_images() -> None:
    frames = moving_video(1, frames=10, height=37, width=50, speed=3)
    frames[3] = np.random.default_rng(0).integers(0, 256, frames[3].shape)
    frames[4] = 255 - frames[0]
    found = ssim_to_image(torch.from_numpy(frames), torch.from_numpy(frames[0]))
    for value, frame in zip(found, frames, strict=True):
        expected = structural_similarity(
            frames[0], frame, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert value == pytest.approx(expected, abs=2e-5)
    assert found[0] == pytest.approx(1, abs=1e-6) and found[4] < 0


def test_psnr_of_equal_frames_is_finite() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[1] = 10
    expected = [PSNR_CEILING, 10 * np.log10(255**2 / 100)]
    assert psnr_to_image(torch.from_numpy(frames), torch.from_numpy(frames[0])).tolist() == pytest.approx(expected)


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).standard_normal((400, 2)) * (1, 5) + (3, -2)
    mean, low, high = bootstrap_mean(values, 2000, np.random.default_rng(1))
    half = 1.96 * values.std(axis=0, ddof=1) / 20
    assert mean == pytest.approx(values.mean(axis=0))
    assert high - low == pytest.approx(2 * half, rel=0.1)


@pytest.mark.parametrize(("hits", "count"), [(0, 12), (5, 12), (64, 64)])
def test_wilson_equals_scipys(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_diversity_by_hand() -> None:
    one, other, third = (torch.full((2, 4, 4, 3), value, dtype=torch.uint8) for value in (10, 13, 10))
    other[1] = 10
    # Over three pairs of seeds, two of which differ by 3 in frame 0.
    assert pixel_diversity([one, other, third]).tolist() == pytest.approx([np.sqrt(6), 0])
    assert mean_distance(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx(10 / 3)
