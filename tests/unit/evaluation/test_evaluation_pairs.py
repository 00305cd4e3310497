"""Which video belongs to which reference, and how frames divide into chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.evaluation.chunks import divide
from megatron_flashi2v.evaluation.pairs import pair


def paths(*names: str) -> list[Path]:
    return [Path(f"{name}.mp4") for name in names]


def found(videos: list[Path], references: list[Path]) -> dict[str, list[str]]:
    return {group.reference.stem: [video.stem for video in group.videos] for group in pair(videos, references).groups}


@pytest.mark.parametrize(
    ("videos", "references", "expected", "rule"),
    [
        (["a", "b"], ["a", "b"], {"a": ["a"], "b": ["b"]}, "names"),
        # Seeds are ordered as numbers.
        (["a-10", "a-9", "b-9"], ["a", "b"], {"a": ["a-9", "a-10"], "b": ["b-9"]}, "names"),
        # What looks like a seed may be part of the name.
        (["clip-0", "clip-1"], ["clip-0", "clip-1"], {"clip-0": ["clip-0"], "clip-1": ["clip-1"]}, "names"),
        (["clip-0-7", "clip-1-7"], ["clip-0", "clip-1"], {"clip-0": ["clip-0-7"], "clip-1": ["clip-1-7"]}, "names"),
        # One that matches nothing must not shift those after it.
        (["a", "c"], ["a", "b", "c"], {"a": ["a"], "c": ["c"]}, "names"),
        (["x", "y"], ["a", "b"], {"a": ["x"], "b": ["y"]}, "order"),
        (["x-0", "x-1", "y-0", "y-1"], ["a", "b"], {"a": ["x-0", "x-1"], "b": ["y-0", "y-1"]}, "order"),
        (["x-0", "x-1", "x-2"], ["a", "b", "c"], {"a": ["x-0"], "b": ["x-1"], "c": ["x-2"]}, "order"),
        (["x", "y", "z"], ["a", "b"], {"a": ["x"], "b": ["y"]}, "order"),
    ],
)
def test_pairs(videos: list[str], references: list[str], expected: dict[str, list[str]], rule: str) -> None:
    assert found(paths(*videos), paths(*references)) == expected
    assert pair(paths(*videos), paths(*references)).rule == rule


def test_what_has_no_counterpart_is_named() -> None:
    assert pair(paths("a", "z"), paths("a", "b")).unpaired == tuple(paths("z", "b"))


def test_chunks_leave_out_the_condition_and_what_fills_no_chunk() -> None:
    chunks = divide(49, 16, include_first=False)
    assert [(part.start, part.stop) for part in chunks.ranges] == [(1, 17), (17, 33), (33, 49)]
    assert chunks.left_out == 0
    chunks = divide(9, 4, include_first=True)
    assert [(part.start, part.stop) for part in chunks.ranges] == [(0, 4), (4, 8)]
    assert chunks.left_out == 1


def test_a_chunk_longer_than_the_video_is_refused() -> None:
    assert divide(17, 16, include_first=False).count == 1
    with pytest.raises(ConfigError, match="--chunk-frames is 16, but the videos have 15 frames after frame 0"):
        divide(16, 16, include_first=False)
