"""The video files of an evaluation: found, described and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.video import Video


@dataclass(frozen=True, kw_only=True)
class VideoShape:
    """Frames, and pixels of the picture as players show it."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width} x {self.height} pixels"


def find_videos(folder: Path, flag: str) -> list[Path]:
    """The mp4 files of a folder in the order of their names; hidden ones are left out.

    Args:
        folder: as given by the user.
        flag: the flag that gave it, for the error.

    Raises:
        DataError: there is no such folder, or no mp4 in it.
    """
    if not folder.is_dir():
        raise DataError(f"--{flag} {folder}: there is no such folder; give a folder of mp4 files")
    found = [path for path in folder.iterdir() if path.suffix.lower() == ".mp4" and not path.name.startswith(".")]
    if not found:
        raise DataError(f"--{flag} {folder}: holds no mp4 file; give a folder of mp4 files")
    return sorted(found, key=lambda path: path.name)


def shape_of(path: Path) -> VideoShape:
    """Read the shape of a file's video.

    Raises:
        DataError: the file is damaged, or holds no video.
    """
    with Video(path) as video:
        facts = video.facts
    return VideoShape(frames=facts.num_frames, height=facts.height, width=facts.width)


def read_frames(path: Path) -> torch.Tensor:
    """All frames of a file: uint8 RGB ``[T, H, W, C]``.

    Raises:
        DataError: the file is damaged.
    """
    with Video(path) as video:
        return video.read(range(video.facts.num_frames)).permute(0, 2, 3, 1).contiguous()


def common_shape(paths: Sequence[Path], reference: Path) -> VideoShape:
    """The one shape of all files.

    Raises:
        DataError: a file is damaged, or of another length or size than the reference.
    """
    expected = shape_of(reference)
    for path in paths:
        shape = shape_of(path)
        if shape != expected:
            raise DataError(
                f"{path}: {shape}, but the reference {reference} has {expected}; videos and references must all be of "
                "one length and size"
            )
    return expected
