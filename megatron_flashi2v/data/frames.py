"""Chooses the frames of a file that make a clip: conversion of the frame rate, then a window of the sample's length.

By index: FlashI2V's arithmetic on frame numbers (branch main, flashi2v/data/utils/wan_utils.py). By time: the frame
nearest to each wanted time, for files whose frames are not evenly spaced.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_flashi2v.config.clips import FilterRules, FramePicking

FPS_TOLERANCE = 0.1
"""By index, rates closer than this, in frames per second, count as equal (29.97 and 30)."""
RATE_TOLERANCE = 0.02
"""By time, rates closer than this share count as equal (119.88 and 120; 29.6, where frames are missing, and 30)."""


def same_rate(first: float, second: float, picking: FramePicking) -> bool:
    """Return whether two frame rates are equal within rounding of their notation."""
    if picking == "index":
        return abs(first - second) <= FPS_TOLERANCE
    return abs(first - second) <= RATE_TOLERANCE * max(first, second)


def frame_interval(file_fps: float, fps: float, picking: FramePicking = "index") -> float:
    """Frames of the file per frame of the clip; 1 where the rates are nearly equal.

    Args:
        file_fps: frames per second of the file.
        fps: frames per second of the clip.
        picking: by time, a file that is a little too slow is taken as it is.
    """
    slow = picking == "time" and file_fps < fps and same_rate(file_fps, fps, picking)
    return 1.0 if slow or abs(file_fps - fps) < FPS_TOLERANCE else file_fps / fps


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


def choose_by_time(
    times_s: np.ndarray, size: int, fps: float, pick: Callable[[int], int], rules: FilterRules
) -> np.ndarray:
    """A window of ``size`` frames at the times t, t + 1 / fps, t + 2 / fps and so on, t being its first frame's.

    Args:
        times_s: ascending, seconds of the frames to choose from.
        size: frames of the window.
        fps: frames per second of the window.
        pick: as for :func:`choose_window`.
        rules: likewise.

    Returns:
        int64 [size], places in ``times_s``; empty where the window is longer than the frames last.
    """
    if not len(times_s):
        return np.empty(0, np.int64)
    half_s = float(np.median(np.diff(times_s))) / 2 if len(times_s) > 1 else 0.0
    end_s = times_s[-1] + half_s
    firsts = nearest(times_s, np.arange(times_s[0], end_s, 1 / fps))
    firsts = firsts[times_s[firsts] + (size - 1) / fps <= end_s]
    if not len(firsts):
        return firsts
    starts = max(1, len(firsts) - 1) if rules == "reference" else len(firsts)
    first = firsts[pick(starts)]
    return nearest(times_s, times_s[first] + np.arange(size) / fps)


def nearest(times_s: np.ndarray, wanted_s: np.ndarray) -> np.ndarray:
    """Of each wanted time the place of the nearest frame; of two as near, the earlier."""
    if len(times_s) == 1:
        return np.zeros(len(wanted_s), np.int64)
    after = np.clip(np.searchsorted(times_s, wanted_s), 1, len(times_s) - 1)
    before = after - 1
    return np.where(wanted_s - times_s[before] <= times_s[after] - wanted_s, before, after)
