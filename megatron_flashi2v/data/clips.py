"""From one annotation to the pixels of its sample, or to the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.filters import FilterSettings, clip_length, judge, with_measured
from megatron_flashi2v.data.frames import FPS_TOLERANCE, choose_window, frame_indices, frame_interval
from megatron_flashi2v.data.reasons import Drop
from megatron_flashi2v.data.transforms import Interpolation, resize_and_crop, to_model_range
from megatron_flashi2v.data.video import Video, VideoError, VideoFacts
from megatron_flashi2v.runtime.random import keyed_seed


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The pixels of one sample.

    Attributes:
        video_CTHW: fp32 RGB in [-1, 1].
        indices: frames of the file that it shows.
        facts: what the file says of itself.
    """

    video_CTHW: torch.Tensor
    indices: tuple[int, ...]
    facts: VideoFacts


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The pixels of one sample as decoded and resized.

    Attributes:
        frames_TCHW: uint8 RGB of the sample's size.
        indices: frames of the file that it shows.
        facts: what the file says of itself.
    """

    frames_TCHW: torch.Tensor
    indices: tuple[int, ...]
    facts: VideoFacts

    def clip(self) -> Clip:
        """The same for the model."""
        return Clip(video_CTHW=to_model_range(self.frames_TCHW), indices=self.indices, facts=self.facts)


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What decides a sample's pixels, besides its annotation and file.

    Attributes:
        wanted: what is wanted of a clip, and the size and rate of a sample.
        seed: of the draws while preparing.
        interpolation: how frames are resized.
    """

    wanted: FilterSettings
    seed: int
    interpolation: Interpolation


def load_frames(entry: Entry, settings: ClipSettings) -> Frames | Drop:
    """Open the annotation's file, judge the clip by what the file says, and read one window of frames.

    The result depends on the arguments and the file alone; the window's place is keyed by (seed, the sample's key).

    Args:
        entry: the annotation.
        settings: the size, rate and place of the window.

    Returns:
        The frames, or why the clip is dropped; nothing that is wrong with a file is raised.
    """
    wanted = settings.wanted
    try:
        with Video(entry.file) as video:
            indices = _window(entry, wanted, video.facts, settings.seed)
            if isinstance(indices, Drop):
                return indices
            frames_TCHW = video.read(indices, entry.crop)
            facts = video.facts
    except VideoError as error:
        return Drop(error.reason, str(error))
    frames_TCHW = resize_and_crop(frames_TCHW, wanted.height, wanted.width, settings.interpolation)
    return Frames(frames_TCHW=frames_TCHW, indices=tuple(indices), facts=facts)


def choose_caption(entry: Entry, *, seed: int) -> str:
    """One of the entry's captions that are not blank, drawn by (seed, the sample's key)."""
    captions = [caption for caption in entry.captions or () if caption.strip()] or [""]
    return captions[keyed_seed(seed, "caption", entry.key) % len(captions)]


def _window(entry: Entry, settings: FilterSettings, facts: VideoFacts, seed: int) -> list[int] | Drop:
    if entry.fps is not None and abs(entry.fps - facts.fps) > FPS_TOLERANCE:
        return Drop(
            "fps_mismatch",
            f"{entry.source}: fps is {entry.fps:g}, but {entry.file} has {facts.fps:g}; correct the annotation or "
            "leave fps out",
        )
    measured = with_measured(
        entry,
        settings,
        height=facts.height,
        width=facts.width,
        fps=facts.fps,
        num_frames=facts.num_frames,
    )
    length = clip_length(measured, settings.rules) or 0
    drop = judge(measured, settings)
    if drop is not None and drop.reason == "too_short" and length < (clip_length(entry, settings.rules) or 0):
        return Drop(
            "truncated",
            f"{entry.source}: the clip ends at frame {entry.start_frame + (clip_length(entry, settings.rules) or 0)}, "
            f"but {entry.file} ends at {facts.num_frames}",
        )
    if drop is not None:
        return drop
    indices = frame_indices(measured.start_frame, length, frame_interval(facts.fps, settings.fps))
    if len(indices) < settings.num_frames:
        return Drop(
            "too_short",
            f"{entry.source}: {length} frames at the file's {facts.fps:g} fps are {len(indices)} at {settings.fps:g} "
            f"fps; a sample needs {settings.num_frames}",
        )
    chosen = choose_window(
        indices,
        settings.num_frames,
        lambda starts: keyed_seed(seed, "frame_window", entry.key) % starts,
        settings.rules,
    )
    return [int(index) for index in chosen]
