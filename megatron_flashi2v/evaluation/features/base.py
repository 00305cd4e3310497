"""Interface of all networks of features.

Shapes: B clips, T frames, H and W rows and columns, C = 3 colours, K chunks, N frames on their own, D features.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.evaluation.chunks import Chunks
from megatron_flashi2v.evaluation.videos import VideoShape


class VideoFeatures(abc.ABC):
    """A frozen network that turns a clip into one row of features.

    Attributes:
        measure: what a distance between such features is called.
        width: features of a clip.
        still_frames: how often a frame is repeated to be looked at on its own.
        batch: clips computed at a time.
    """

    measure: str
    width: int
    still_frames: int = 1
    batch: int = 8

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the features, JSON-ready: the network, its files' SHA-256 and its input."""

    @abc.abstractmethod
    def embed(self, clips_BTHWC: torch.Tensor) -> torch.Tensor:
        """Features of uint8 RGB clips: fp32 ``[B, D]``."""

    @abc.abstractmethod
    def check(self, chunks: Chunks, shape: VideoShape) -> None:
        """Refuse chunks or videos that the network does not take.

        Raises:
            ConfigError: names the flag or the videos' size, and the rule.
        """

    def of_chunks(self, frames_THWC: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """Features of each chunk of a video, which sees its own frames only: fp32 ``[K, D]`` on the host."""
        clips = torch.stack([frames_THWC[part.start : part.stop] for part in chunks.ranges])
        return self._batched(clips)

    def of_frames(self, frames_NHWC: torch.Tensor) -> torch.Tensor:
        """Features of single frames, each as a still video: fp32 ``[N, D]`` on the host."""
        return self._batched(frames_NHWC[:, None].expand(-1, self.still_frames, -1, -1, -1))

    def close(self) -> None:  # noqa: B027 - most hold nothing but memory
        """Release the network's resources, such as a process."""

    def _batched(self, clips_BTHWC: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.embed(part).float().cpu() for part in clips_BTHWC.split(self.batch)])


def resized(clips_BTHWC: torch.Tensor, height: int, width: int, *, antialias: bool) -> torch.Tensor:
    """Frames of another size, whatever their aspect: fp32 ``[B, T, C, H, W]`` in [0, 255], bilinear."""
    clips, frames = clips_BTHWC.shape[:2]
    pictures = clips_BTHWC.flatten(0, 1).permute(0, 3, 1, 2).float()
    if pictures.shape[2:] != (height, width):
        pictures = F.interpolate(
            pictures, size=(height, width), mode="bilinear", align_corners=False, antialias=antialias
        )
    return pictures.unflatten(0, (clips, frames))


def require_min_frames(chunks: Chunks, least: int, what: str) -> None:
    """Refuse chunks that are shorter than a network takes.

    Raises:
        ConfigError: names the flag, its value and the rule.
    """
    if chunks.frames < least:
        raise ConfigError(f"--chunk-frames is {chunks.frames}; {what} takes at least {least} frames")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        ConfigError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def folder_sha256(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files of a folder that match, by name."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.name: file_sha256(path) for path in found}
