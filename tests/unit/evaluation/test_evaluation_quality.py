"""PSNR against values worked out by hand."""

import math

import numpy as np
import pytest

from megatron_flashi2v.evaluation.quality import mean_psnr, psnr_per_frame


def test_psnr_of_known_errors():
    reference = np.full((3, 2, 2, 3), 100, np.uint8)
    other = reference.copy()
    other[0] += 5  # squared error 25 everywhere
    other[1, 0, 0, 0] -= 12  # squared error 144 in one of 12 values: mean 12
    values = psnr_per_frame(reference, other)
    assert values.dtype == np.float64
    assert values[0] == pytest.approx(10 * math.log10(65025 / 25), rel=1e-15)
    assert values[1] == pytest.approx(10 * math.log10(65025 / 12), rel=1e-15)
    assert values[2] == math.inf


def test_difference_does_not_wrap_around_in_uint8():
    dark, bright = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr_per_frame(dark, bright)[0] == 0.0
    assert psnr_per_frame(bright, dark)[0] == 0.0


def test_mean_is_over_the_frames_decibels():
    reference = np.full((2, 2, 2, 3), 100, np.uint8)
    other = reference.copy()
    other[0] += 1
    other[1] += 10
    assert mean_psnr(reference, other) == pytest.approx(10 * math.log10(65025) - 10)


def test_one_frame_may_come_without_its_axis():
    frame = np.zeros((4, 4, 3), np.uint8)
    assert psnr_per_frame(frame, frame + np.uint8(1)).shape == (1,)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.zeros((1, 2, 2, 3), np.uint8), np.zeros((2, 2, 2, 3), np.uint8), "equal shapes"),
        (np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), "equal shapes"),
        (np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 2, 2, 3), np.uint8), "uint8"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        psnr_per_frame(first, second)
