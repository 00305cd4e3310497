"""Small videos of a disk that moves over a pattern, with everything about them known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_flashi2v.sampling.video import write_mp4


def moving_video(
    seed: int, *, frames: int = 9, height: int = 32, width: int = 48, speed: float = 1.5
) -> NDArray[np.uint8]:
    """A striped disk that bounces over stripes, uint8 ``[T, H, W, 3]``.

    Args:
        seed: of colours, places and directions.
        frames: of the video.
        height: pixels.
        width: pixels.
        speed: pixels a frame.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    ground, stripes, disk = rng.uniform(20, 120, 3), rng.uniform(0, 80, 3), rng.uniform(130, 235, 3)
    slope, phase, angle = rng.uniform(-0.5, 0.5), rng.uniform(0, 6), rng.uniform(0, 2 * np.pi)
    background = ground + stripes * (0.5 + 0.5 * np.sin(0.5 * columns + slope * rows + phase))[..., None]
    radius = height / 5
    limits = np.array([width, height]) - 2 * radius
    place, step = rng.uniform(0, 1, 2) * limits, speed * np.array([np.cos(angle), np.sin(angle)])
    video = []
    for frame in range(frames):
        # Reflected at the edges: a triangle wave of the distance travelled.
        x, y = radius + np.abs((place + frame * step + limits) % (2 * limits) - limits)
        cover = np.clip(radius - np.hypot(columns - x, rows - y) + 0.5, 0, 1)[..., None]
        texture = disk + 20 * np.sin(columns - x)[..., None]
        video.append(background * (1 - cover) + texture * cover)
    return np.stack(video).round().clip(0, 255).astype(np.uint8)


def write_videos(folder: Path, videos: dict[str, NDArray[np.uint8]]) -> Path:
    """Write mp4 files by name, at 8 frames a second; returns the folder."""
    for name, frames in videos.items():
        write_mp4(folder / f"{name}.mp4", frames, 8)
    return folder
