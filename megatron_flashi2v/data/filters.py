"""Which annotations are wanted: rules on what an annotation says, in the reference's order (FlashI2V's
``flashi2v/data/utils/wan_utils.py``, branch main).

``filter_rules="reference"`` decides exactly as the reference does. ``filter_rules="corrected"`` (the default) differs
in this: a missing ``num_frames``, ``fps`` or ``resolution`` is read from the file instead of dropping the annotation or
failing; the end of ``cut`` is honoured; too slow and too fast are not swapped; the pixel floor is on the clip's own
pixels, so that an exact 720x1280 clip passes a 720x1280 floor; size rules look at the picture after ``crop``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from megatron_flashi2v.config.clips import FilterRules, FilterSettings
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.frames import frame_indices, frame_interval
from megatron_flashi2v.data.reasons import Drop

REFERENCE_DEFAULT_FPS = 24.0


def judge(entry: Entry, settings: FilterSettings) -> Drop | None:
    """Return whether a clip is wanted, from its annotation alone; no file is touched.

    Under the corrected rules a fact that the annotation does not give passes; judge again with
    :func:`with_measured` once the file was opened.

    Returns:
        None to keep it, or the first rule that it breaks.
    """
    return next(_broken_rules(entry, settings), None)


def with_measured(
    entry: Entry, settings: FilterSettings, *, height: int, width: int, fps: float, num_frames: int
) -> Entry:
    """Return the annotation with the file's own size, and its rate and length where the annotation has none.

    Under the reference's rules the annotation's word stands. The length is cut to what the file holds.

    Args:
        entry: as annotated.
        settings: decides the rules.
        height: pixels of the file's picture as displayed.
        width: pixels of the file's picture as displayed.
        fps: the file's frames per second.
        num_frames: frames that the file holds.
    """
    if settings.filter_rules == "reference":
        return entry
    left = max(0, num_frames - entry.start_frame)
    annotated = clip_length(entry, settings.filter_rules)
    length = left if annotated is None else min(annotated, left)
    return dataclasses.replace(
        entry,
        height=height,
        width=width,
        fps=fps if entry.fps is None else entry.fps,
        num_frames=length,
    )


def clip_length(entry: Entry, rules: FilterRules) -> int | None:
    """Frames of the file that belong to the clip, or None where the annotation does not say."""
    if rules == "reference" or entry.cut is None or entry.cut[1] is None:
        return entry.num_frames
    length = entry.cut[1] - entry.cut[0]
    return length if entry.num_frames is None else min(length, entry.num_frames)


def _broken_rules(entry: Entry, settings: FilterSettings) -> Iterator[Drop]:
    reference = settings.filter_rules == "reference"
    if entry.captions is None or (not reference and not any(caption.strip() for caption in entry.captions)):
        yield Drop("no_cap", f"{entry.source}: cap is missing or blank; a caption is needed")
    if entry.height is None or entry.width is None:
        if reference:
            yield Drop("no_resolution", f"{entry.source}: resolution must have a height and a width above 0")
            return
    else:
        yield from _broken_size_rules(entry, settings, entry.height, entry.width)
    yield from _broken_time_rules(entry, settings)


def _broken_size_rules(entry: Entry, settings: FilterSettings, height: int, width: int) -> Iterator[Drop]:
    if settings.filter_rules == "corrected" and entry.crop is not None:
        x_start, x_end, y_start, y_end = entry.crop
        height, width = y_end - y_start, x_end - x_start
    aspect = height / width
    if not settings.min_aspect <= aspect <= settings.max_aspect:
        yield Drop(
            "aspect_mismatch",
            f"{entry.source}: height / width is {height} / {width} = {aspect:.3f}; it must be "
            f"{settings.min_aspect:g} to {settings.max_aspect:g}",
        )
    floor = settings.pixel_floor
    if settings.filter_rules == "reference":
        wanted = settings.height / settings.width
        floor = math.ceil(settings.pixel_floor * max(aspect / wanted, wanted / aspect))
    if height * width < floor:
        yield Drop(
            "res_too_small",
            f"{entry.source}: height * width is {height} * {width} = {height * width}; it must be at least {floor}",
        )


def _broken_time_rules(entry: Entry, settings: FilterSettings) -> Iterator[Drop]:
    reference = settings.filter_rules == "reference"
    fps = REFERENCE_DEFAULT_FPS if reference and entry.fps is None else entry.fps
    length = clip_length(entry, settings.filter_rules)
    if length is None and reference:
        yield Drop("malformed_entry", f"{entry.source}: num_frames is missing; the reference's rules need it")
        return
    picking = "index" if reference else settings.frame_picking
    timeless = settings.num_frames == 1 and picking == "time"  # one frame has no rate and no length
    if length is not None and fps is not None and not (timeless and length == 1):
        limit = settings.too_long_factor * settings.num_frames * fps / settings.fps
        if length > limit:
            yield Drop(
                "too_long",
                f"{entry.source}: the clip has {length} frames at {fps:g} fps; it may have {limit:.0f} "
                f"({settings.too_long_factor:g} samples)",
            )
    interval = None if fps is None else frame_interval(fps, settings.fps, picking)
    if interval is not None and interval < 1.0 and not timeless:
        yield Drop("fps_too_low", f"{entry.source}: fps is {fps:g}; it must be at least {settings.fps:g}")
    yield from _broken_motion_rules(entry, settings)
    if length is not None and interval is not None:
        frames = len(frame_indices(entry.start_frame, length, interval))
        if frames < settings.num_frames:
            yield Drop(
                "too_short",
                f"{entry.source}: {length} frames at {fps:g} fps are {frames} at {settings.fps:g} fps; a sample "
                f"needs {settings.num_frames}",
            )


def _broken_motion_rules(entry: Entry, settings: FilterSettings) -> Iterator[Drop]:
    below, above = "too_slow", "too_fast"
    motion = entry.motion
    if settings.filter_rules == "reference":
        below, above = above, below
        motion = 0.0 if motion is None else motion
    elif motion is None:
        if settings.min_motion > 0.0:
            yield Drop("no_motion", f"{entry.source}: motion is missing; it must be at least {settings.min_motion:g}")
        return
    if motion < settings.min_motion:
        yield Drop(below, f"{entry.source}: motion is {motion:g}; it must be at least {settings.min_motion:g}")
    if motion > settings.max_motion:
        yield Drop(above, f"{entry.source}: motion is {motion:g}; it may be at most {settings.max_motion:g}")
