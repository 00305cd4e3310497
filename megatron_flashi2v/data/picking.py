"""Which frames of an opened file a sample shows, or why it shows none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from megatron_flashi2v.config.clips import FilterSettings
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.filters import clip_length, judge, with_measured
from megatron_flashi2v.data.frames import choose_by_time, choose_window, frame_indices, frame_interval, same_rate
from megatron_flashi2v.data.reasons import Drop
from megatron_flashi2v.data.timestamps import is_regular, typical_rate
from megatron_flashi2v.data.video import Video, VideoFacts

Pick = Callable[[int], int]
"""Given n, an integer in [0, n): which of n possible starts."""


def pick_frames(entry: Entry, wanted: FilterSettings, video: Video, pick: Pick) -> list[int] | Drop:
    """Judge a clip by what its file says, and choose a window of frames.

    Args:
        entry: the annotation.
        wanted: the size and rate of a sample, and what is accepted.
        video: the file.
        pick: draws the window's place.

    Returns:
        Ascending frame numbers, or why the clip is dropped.
    """
    picking, facts = wanted.frame_picking, video.facts
    if entry.fps is not None and not any(same_rate(entry.fps, rate, picking) for rate in video.rates):
        return Drop(
            "fps_mismatch",
            f"{entry.source}: fps is {entry.fps:g}, but {entry.file} has {facts.fps:g}; correct the annotation or "
            "leave fps out",
        )
    measured = _measured(entry, wanted, video)
    start, length = entry.start_frame, clip_length(measured, wanted.filter_rules) or 0
    times_s = video.times_s[start : start + length]
    if picking == "index" or is_regular(times_s, facts.fps):
        interval = frame_interval(facts.fps, wanted.fps, picking)
        drop = _judge(entry, measured, wanted, facts)
        if drop is not None:
            return drop
        indices = frame_indices(start, length, interval)
        if len(indices) < wanted.num_frames:
            return _too_short(entry, wanted, f"{length} frames at the file's {facts.fps:g} fps are {len(indices)}")
        chosen = choose_window(indices, wanted.num_frames, pick, wanted.filter_rules)
    else:
        drop = _judge(entry, _as_if_regular(measured, wanted, times_s), wanted, facts)
        if drop is not None:
            return drop
        chosen = start + choose_by_time(times_s, wanted.num_frames, wanted.fps, pick, wanted.filter_rules)
        if not len(chosen):
            return _too_short(entry, wanted, f"{len(times_s)} frames over {np.ptp(times_s):.2f} s are too few")
    return [int(index) for index in chosen]


def pick_still(entry: Entry, wanted: FilterSettings, facts: VideoFacts) -> Drop | None:
    """Why a still picture is dropped, or None; its rate, length and time play no part."""
    if entry.start_frame > 0:
        return Drop("truncated", f"{entry.source}: the clip begins at frame {entry.start_frame} of a picture")
    if entry.crop is not None and (entry.crop[1] > facts.width or entry.crop[3] > facts.height):
        return Drop(
            "bad_crop",
            f"{entry.source}: crop {list(entry.crop)} lies outside the picture of {facts.width} x {facts.height} "
            f"pixels of {entry.file}",
        )
    timeless = dataclasses.replace(entry, fps=None, num_frames=None, cut=None)
    measured = with_measured(timeless, wanted, height=facts.height, width=facts.width, fps=wanted.fps, num_frames=1)
    return judge(measured, wanted)


def _measured(entry: Entry, wanted: FilterSettings, video: Video) -> Entry:
    """The annotation with what the file says of its size, its length and, by time, its rate."""
    facts = video.facts
    if wanted.filter_rules == "corrected":
        if wanted.frame_picking == "time":
            entry = dataclasses.replace(entry, fps=facts.fps)
        if entry.crop is not None:
            height, width = video.crop_size(entry.crop)
            entry = dataclasses.replace(entry, crop=(0, width, 0, height))
    return with_measured(
        entry, wanted, height=facts.height, width=facts.width, fps=facts.fps, num_frames=facts.num_frames
    )


def _as_if_regular(measured: Entry, wanted: FilterSettings, times_s: np.ndarray) -> Entry:
    """The clip with the frames that it would have if none were missing, so that all rules see its real length."""
    if wanted.filter_rules == "reference":
        return measured
    rate = typical_rate(times_s)
    if rate is None:  # one frame, of a file that names no rate
        return dataclasses.replace(measured, fps=wanted.fps)
    frames = 1 + round(float(times_s[-1] - times_s[0]) * rate)
    return dataclasses.replace(measured, cut=(measured.start_frame, None), num_frames=frames, fps=rate)


def _judge(entry: Entry, measured: Entry, wanted: FilterSettings, facts: VideoFacts) -> Drop | None:
    drop = judge(measured, wanted)
    annotated = clip_length(entry, wanted.filter_rules) or 0
    end = entry.start_frame + annotated
    if drop is not None and drop.reason == "too_short" and end > facts.num_frames:
        return Drop(
            "truncated",
            f"{entry.source}: the clip ends at frame {end}, but {entry.file} ends at {facts.num_frames}",
        )
    return drop


def _too_short(entry: Entry, wanted: FilterSettings, found: str) -> Drop:
    return Drop(
        "too_short",
        f"{entry.source}: {found} at {wanted.fps:g} fps; a sample needs {wanted.num_frames}",
    )
