"""Optical flow against known motion, and what counts as frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.moving_videos import moving_video
from numpy.typing import NDArray
from skimage.registration import optical_flow_tvl1

from megatron_flashi2v.evaluation.flow import flow_magnitudes, grey, optical_flow
from megatron_flashi2v.evaluation.motion import flow_ratio, motion_of


def texture(shift_across: float, shift_down: float, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    """A smooth pattern that covers the frame, moved."""
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    x, y = columns - shift_across, rows - shift_down
    value = 128 + 50 * np.sin(0.31 * x + 0.17 * y) + 40 * np.cos(0.23 * y - 0.11 * x) + 20 * np.sin(0.6 * x)
    return np.repeat(value.round().astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.5, 0.0), (2.0, -1.0), (-5.0, 3.0)])
def test_flow_of_a_moved_picture(shift: tuple[float, float]) -> None:
    pictures = grey(torch.from_numpy(np.stack([texture(0, 0), texture(*shift)])))
    flow_2HW = optical_flow(pictures[:1], pictures[1:])[0, :, 8:-8, 8:-8]
    assert flow_2HW.mean(dim=(1, 2)).tolist() == pytest.approx(shift, abs=0.06, rel=0.03)
    assert float((flow_2HW - torch.tensor(shift)[:, None, None]).norm(dim=0).median()) < 0.1


def test_magnitude_is_a_share_of_the_longer_side() -> None:
    still, moved = flow_magnitudes(torch.from_numpy(np.stack([texture(0, 0), texture(0, 0), texture(2, 0)])))
    assert still == 0
    assert float(moved) * 96 == pytest.approx(2, rel=0.1)
    large = np.stack([texture(0, 0), texture(2, 0)]).repeat(3, axis=1).repeat(3, axis=2)  # reduced to 128 columns
    assert float(flow_magnitudes(torch.from_numpy(large))) == pytest.approx(float(moved), rel=0.1)


def test_flow_agrees_with_another_method() -> None:
    """TV-L1 (scikit-image), which minimises something else: the mean flow of videos ranks and scales alike."""
    pairs = []
    for speed in (0.5, 1.0, 2.0):
        frames = torch.from_numpy(moving_video(3, frames=3, height=48, width=64, speed=speed))
        pictures = grey(frames)[:, 0].numpy()
        theirs = np.mean([np.hypot(*optical_flow_tvl1(*pictures[place : place + 2])).mean() for place in (0, 1)])
        pairs.append((float(flow_magnitudes(frames).mean()) * 64, theirs))
    ours, theirs = np.array(pairs).T
    assert np.all(np.diff(ours) > 0)
    assert np.all((ours / theirs > 0.5) & (ours / theirs < 2))


def test_neither_noise_nor_flicker_is_motion() -> None:
    rng = np.random.default_rng(0)
    moving = moving_video(0, height=48, width=64)
    still = np.repeat(moving[:1], 9, axis=0)
    noisy = (still + rng.normal(0, 2, still.shape)).round().clip(0, 255).astype(np.uint8)
    flicker = (still * np.where(np.arange(9) % 2, 0.85, 1.0)[:, None, None, None]).round().astype(np.uint8)
    reference = motion_of(torch.from_numpy(moving))
    for frames in (still, noisy, flicker):
        motion = motion_of(torch.from_numpy(frames))
        ratio = flow_ratio(motion, reference)
        assert ratio is not None and ratio < 0.25
    # Differences between frames take flicker for motion, which is why the flow decides.
    assert motion.differences.mean() > reference.differences.mean()


def test_differences_by_hand() -> None:
    frames = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    frames[1], frames[2] = 200, 190
    assert motion_of(frames).differences.tolist() == [200, 10]


def test_nothing_is_frozen_beside_a_still_reference() -> None:
    still = motion_of(torch.full((3, 16, 16, 3), 9, dtype=torch.uint8))
    assert flow_ratio(still, still) is None
