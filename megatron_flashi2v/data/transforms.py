"""Frames to the sample's size and range: resize to cover the sample, crop the centre.

As in FlashI2V's ``flashi2v/data/utils/transforms.py``, branch main. Resizing works on uint8 and rounds to whole grey
levels, as there; ``bicubic`` is main's interpolation, ``bilinear`` that of branch npu.
"""

from __future__ import annotations

import math

import torch

from megatron_flashi2v.config.clips import Interpolation


def cover_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """The smallest (height, width) of the same aspect that covers the target, in pixels."""
    if height / width < target_height / target_width:
        return target_height, math.ceil(target_height / height * width)
    return math.ceil(target_width / width * height), target_width


def centre_offsets(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """(top, left) of the centre crop, in pixels; halves are rounded to even, as the reference's are."""
    return round((height - target_height) / 2), round((width - target_width) / 2)


def resize_and_crop(
    frames_TCHW: torch.Tensor, height: int, width: int, interpolation: Interpolation = "bicubic"
) -> torch.Tensor:
    """Resize with antialiasing until the target is covered, then crop the centre.

    Args:
        frames_TCHW: uint8 (the result is rounded), or floating (it is not).
        height: target, in pixels.
        width: target, in pixels.
        interpolation: "bicubic" or "bilinear".

    Returns:
        [T, C, height, width] of the same dtype.
    """
    size = cover_size(frames_TCHW.shape[-2], frames_TCHW.shape[-1], height, width)
    resized_TCHW = torch.nn.functional.interpolate(
        frames_TCHW, size=size, mode=interpolation, align_corners=False, antialias=True
    )
    top, left = centre_offsets(*size, height, width)
    return resized_TCHW[..., top : top + height, left : left + width]


def to_model_range(frames_TCHW: torch.Tensor) -> torch.Tensor:
    """uint8 [T, C, H, W] to fp32 [C, T, H, W] in [-1, 1]."""
    return (2.0 * (frames_TCHW / 255.0) - 1.0).permute(1, 0, 2, 3).contiguous()
