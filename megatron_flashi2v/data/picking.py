"""Picks the frames of an opened file that a sample shows, or gives the reason why it shows none."""

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
    if entry.fps is not None and not any(same_rate(entry.fps, rate, wanted.frame_picking) for rate in video.rates):
        return Drop(
            "fps_mismatch",
            f"{entry.source}: fps is {entry.fps:g}, but {entry.file} has {video.facts.fps:g}; correct the annotation "
            "or leave fps out",
        )
    length = clip_length(_measured(entry, wanted, video, video.facts.fps), wanted.filter_rules) or 0
    times_s = video.times_s[entry.start_frame : entry.start_frame + length]
    rate = _even_rate(times_s, video, wanted)
    if rate is None:
        return _pick_by_time(entry, wanted, video, times_s, pick)
    drop = _judge(entry, _measured(entry, wanted, video, rate), wanted, video.facts)
    if drop is not None:
        return drop
    indices = frame_indices(entry.start_frame, length, frame_interval(rate, wanted.fps, wanted.frame_picking))
    if len(indices) < wanted.num_frames:
        return _too_short(entry, wanted, f"{length} frames at the file's {rate:g} fps are {len(indices)}")
    return choose_window(indices, wanted.num_frames, pick, wanted.filter_rules).tolist()


def _even_rate(times_s: np.ndarray, video: Video, wanted: FilterSettings) -> float | None:
    """The rate at which the clip's frames come evenly, so that numbers say the same as times; None without one."""
    if wanted.frame_picking == "index":
        return video.facts.fps
    return next((rate for rate in video.rates if is_regular(times_s, rate)), None)


def _pick_by_time(
    entry: Entry, wanted: FilterSettings, video: Video, times_s: np.ndarray, pick: Pick
) -> list[int] | Drop:
    measured = _as_if_even(_measured(entry, wanted, video, video.facts.fps), wanted, times_s)
    drop = _judge(entry, measured, wanted, video.facts)
    if drop is not None:
        return drop
    chosen = choose_by_time(times_s, wanted.num_frames, wanted.fps, pick, wanted.filter_rules)
    if not len(chosen):
        return _too_short(entry, wanted, f"{len(times_s)} frames over {np.ptp(times_s):.2f} s are too few")
    return (entry.start_frame + chosen).tolist()


def pick_still(entry: Entry, wanted: FilterSettings, facts: VideoFacts) -> Drop | None:
    """Return why a still picture is dropped, or None; rate, length and time do not count."""
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


def _measured(entry: Entry, wanted: FilterSettings, video: Video, rate: float) -> Entry:
    """Return the annotation with the file's size, its length and, under ``time``, its rate."""
    facts = video.facts
    if wanted.filter_rules == "corrected":
        if wanted.frame_picking == "time":
            entry = dataclasses.replace(entry, fps=rate)
        if entry.crop is not None:
            height, width = video.crop_size(entry.crop)
            entry = dataclasses.replace(entry, crop=(0, width, 0, height))
    return with_measured(
        entry, wanted, height=facts.height, width=facts.width, fps=rate, num_frames=facts.num_frames
    )


def _as_if_even(measured: Entry, wanted: FilterSettings, times_s: np.ndarray) -> Entry:
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
