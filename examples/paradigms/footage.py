"""``python -m paradigms.footage FOLDER``: the world as real video files, with captions beside them.

Four folders of ID.mp4 and ID.txt: train, and the three sets of pictures that a recipe for ``--scale 1.3b`` names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.files import atomic_write_text
from megatron_flashi2v.sampling.video import write_mp4
from paradigms.world import CELL, Board, Clip, Frames, make_clip


def write_footage(
    folder: Path, board: Board, counts: dict[str, int], *, frames_per_step: int, enlarge: int, fps: float = 16.0
) -> None:
    """Write the clips.

    Args:
        folder: of the four folders.
        board: of the clips; its frames count steps, of which each takes some video frames.
        counts: clips by folder: train, trained, held, out; trained are the first of train.
        frames_per_step: video frames from cell to cell, 1, 2 or 4: as many as a VAE's temporal stride.
        enlarge: each pixel becomes so many along both sides.
        fps: of the files.
    """
    if CELL % frames_per_step:
        raise ConfigError(f"frames_per_step is {frames_per_step}; it must divide {CELL}")
    for name, count in counts.items():
        domain, prefix = "out" if name == "out" else "in", "train" if name == "trained" else name
        for number in range(count):
            clip = make_clip(board, domain, 0, f"{prefix}-{number:04d}")
            write_mp4(folder / name / f"{clip.key}.mp4", smooth_frames(clip, frames_per_step), fps, enlarge=enlarge)
            atomic_write_text(folder / name / f"{clip.key}.txt", clip.caption + "\n")


def smooth_frames(clip: Clip, frames_per_step: int) -> Frames:
    """The true clip with so many video frames a step, uint8 ``[1 + steps * frames_per_step, H, W, 3]``."""
    steps = len(clip.path_T2) - 1
    places_T2 = [
        np.interp(np.arange(steps * frames_per_step + 1) / frames_per_step, np.arange(steps + 1), clip.path_T2[:, axis])
        for axis in (0, 1)
    ]
    return np.stack([clip.draw(place) for place in np.stack(places_T2, axis=1)])


def main() -> None:
    """Write the world at the size of Wan's VAE: 4 video frames a step, 8 pixels a latent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--train-clips", type=int, default=128)
    parser.add_argument("--test-clips", type=int, default=256)
    parser.add_argument("--enlarge", type=int, default=8, help="pixels of a pixel; a cell is 4 of them")
    arguments = parser.parse_args()
    tests = arguments.test_clips
    write_footage(
        arguments.folder, Board(cells=arguments.cells, frames=arguments.steps + 1),
        {"train": arguments.train_clips, "trained": min(tests, arguments.train_clips), "held": tests, "out": tests},
        frames_per_step=4, enlarge=arguments.enlarge,
    )


if __name__ == "__main__":
    main()
