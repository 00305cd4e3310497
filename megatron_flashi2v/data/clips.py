"""From one annotation to the pixels of its sample, or to the reason why there is none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_flashi2v.config.clips import ClipSettings
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.picking import pick_frames, pick_still
from megatron_flashi2v.data.pictures import read_picture, still_kind
from megatron_flashi2v.data.reasons import Drop, FileError
from megatron_flashi2v.data.transforms import resize_and_crop, to_model_range
from megatron_flashi2v.data.video import MAX_PIXELS, Video, VideoFacts
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
        """Convert the frames for the model."""
        return Clip(video_CTHW=to_model_range(self.frames_TCHW), indices=self.indices, facts=self.facts)


def load_frames(entry: Entry, settings: ClipSettings, seed: int) -> Frames | Drop:
    """Open the annotation's file, judge the clip by what the file says, and read one window of frames.

    The result depends on the arguments and the file alone; the window's place is keyed by (seed, the sample's key).

    Args:
        entry: the annotation.
        settings: the size, rate and place of the window.
        seed: of the draws while preparing.

    Returns:
        The frames, or why the clip is dropped; nothing that is wrong with a file is raised.
    """
    wanted = settings.wanted
    try:
        kind = still_kind(entry.file)
        found = _read_still(entry, settings, kind) if kind else _read_video(entry, settings, seed)
    except FileError as error:
        return Drop(error.reason, str(error))
    if isinstance(found, Drop):
        return found
    frames_TCHW = resize_and_crop(found.frames_TCHW, wanted.height, wanted.width, settings.interpolation)
    return dataclasses.replace(found, frames_TCHW=frames_TCHW)


def _read_video(entry: Entry, settings: ClipSettings, seed: int) -> Frames | Drop:
    """A window of frames in the file's own size."""
    wanted = settings.wanted
    with Video(entry.file, frame_picking=wanted.frame_picking, picture=settings.picture) as video:
        indices = pick_frames(entry, wanted, video, lambda starts: keyed_seed(seed, "frame_window", entry.key) % starts)
        if isinstance(indices, Drop):
            return indices
        return Frames(frames_TCHW=video.read(indices, entry.crop), indices=tuple(indices), facts=video.facts)


def _read_still(entry: Entry, settings: ClipSettings, kind: str) -> Frames | Drop:
    """A still picture in its own size, as a sample of one frame."""
    if settings.wanted.num_frames > 1:
        return Drop(
            "too_short",
            f"{entry.source}: {entry.file} is a picture ({kind}); a sample needs {settings.wanted.num_frames} frames "
            "(--num-frames 1 takes pictures)",
        )
    picture_CHW = read_picture(entry.file, MAX_PIXELS)
    _, height, width = picture_CHW.shape
    facts = VideoFacts(height=height, width=width, fps=settings.wanted.fps, num_frames=1)
    drop = pick_still(entry, settings.wanted, facts)
    if drop is not None:
        return drop
    if entry.crop is not None:
        x_start, x_end, y_start, y_end = entry.crop
        picture_CHW = picture_CHW[:, y_start:y_end, x_start:x_end]
    return Frames(frames_TCHW=picture_CHW[None], indices=(0,), facts=facts)


def choose_caption(entry: Entry, *, seed: int) -> str:
    """One of the entry's captions that are not blank, drawn by (seed, the sample's key)."""
    captions = [caption for caption in entry.captions or () if caption.strip()] or [""]
    return captions[keyed_seed(seed, "caption", entry.key) % len(captions)]
