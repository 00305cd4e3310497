"""Which frames of a file make a clip: frame-rate conversion by index arithmetic, then a window.

As in FlashI2V's ``flashi2v/data/utils/wan_utils.py``, branch main.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_flashi2v.config.clips import FilterRules

FPS_TOLERANCE = 0.1
"""Rates closer than this, in frames per second, count as equal (29.97 and 30)."""


def frame_interval(file_fps: float, fps: float) -> float:
    """Frames of the file per frame of the clip; 1 where the rates are equal within :data:`FPS_TOLERANCE`."""
    return 1.0 if abs(file_fps - fps) < FPS_TOLERANCE else file_fps / fps


def frame_indices(start: int, num_frames: int, interval: float) -> np.ndarray:
    """Frames of the file that the clip shows at the new rate.

    Args:
        start: first frame.
        num_frames: frames of the file that belong to the clip.
        interval: frames of the file per frame of the clip.

    Returns:
        int64 [N], ascending, in [start, start + num_frames).
    """
    indices = np.arange(start, start + num_frames, interval).astype(np.int64)
    # arange may overshoot its end by rounding.
    return indices[indices < start + num_frames]


def choose_window(indices: np.ndarray, size: int, pick: Callable[[int], int], rules: FilterRules) -> np.ndarray:
    """A contiguous window of ``size`` frames.

    Args:
        indices: frames to choose from, at least ``size``.
        size: frames of the window.
        pick: given n, an integer in [0, n): which of n possible starts.
        rules: the reference never picks the last possible start (unless it is the only one).

    Returns:
        int64 [size].

    Raises:
        ValueError: fewer than ``size`` indices.
    """
    if len(indices) < size:
        raise ValueError(f"a window of {size} frames cannot be cut from {len(indices)}")
    starts = len(indices) - size + 1
    if rules == "reference":
        starts = max(1, starts - 1)
    first = pick(starts)
    return indices[first : first + size]
