"""Resizing and cropping; the golden tests hold the exact pixels."""

from __future__ import annotations

import pytest
import torch

from megatron_flashi2v.data.transforms import centre_offsets, cover_size, resize_and_crop, to_model_range


@pytest.mark.parametrize(("height", "width"), [(480, 832), (481, 833), (100, 2000), (2000, 100), (33, 47), (480, 831)])
def test_target_is_always_covered(height: int, width: int) -> None:
    for target in ((480, 832), (48, 80), (17, 17)):
        size = cover_size(height, width, *target)
        assert size[0] >= target[0] and size[1] >= target[1]
        assert size[0] == target[0] or size[1] == target[1]
        frames_TCHW = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        assert resize_and_crop(frames_TCHW, *target).shape == (1, 3, *target)


def test_halves_round_to_even() -> None:
    assert centre_offsets(11, 13, 10, 10) == (0, 2)


def test_crop_takes_the_centre() -> None:
    frames_TCHW = torch.zeros(1, 1, 8, 20, dtype=torch.uint8)
    frames_TCHW[..., 6:14] = 255
    assert resize_and_crop(frames_TCHW, 8, 8).min() == 255


def test_range_and_order() -> None:
    frames_TCHW = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 5)
    video_CTHW = to_model_range(frames_TCHW)
    assert video_CTHW.shape == (3, 2, 4, 5) and video_CTHW.dtype == torch.float32
    assert (video_CTHW[:, 0] == -1).all() and (video_CTHW[:, 1] == 1).all()
