"""Chunks of a video along time."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_flashi2v.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Consecutive ranges of frames, all of one length.

    Attributes:
        frames: of each chunk.
        first: frame at which the first chunk starts.
        count: chunks.
        left_out: frames at the end that fill no chunk.
    """

    frames: int
    first: int
    count: int
    left_out: int

    @property
    def ranges(self) -> list[range]:
        """The frames of each chunk."""
        starts = (self.first + place * self.frames for place in range(self.count))
        return [range(start, start + self.frames) for start in starts]


def divide(num_frames: int, chunk_frames: int, *, include_first: bool) -> Chunks:
    """The chunks of a video.

    Args:
        num_frames: of the video.
        chunk_frames: of a chunk.
        include_first: start at frame 0, the condition, instead of frame 1.

    Raises:
        ConfigError: the video is shorter than a chunk.
    """
    first = 0 if include_first else 1
    usable = num_frames - first
    if usable < chunk_frames:
        without = "" if include_first else " after frame 0, the condition"
        raise ConfigError(
            f"--chunk-frames is {chunk_frames}, but the videos have {usable} frames{without}; give at most {usable}"
        )
    return Chunks(
        frames=chunk_frames, first=first, count=usable // chunk_frames, left_out=usable % chunk_frames
    )
