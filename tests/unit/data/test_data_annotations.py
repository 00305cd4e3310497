"""Annotation files: what is accepted, and what an error says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.annotations import Entry, parse_entry, read_annotations
from megatron_flashi2v.data.reasons import Drop

GOOD = {"path": "a/clip.mp4", "cap": "a dog"}


def parse(**fields: Any) -> Entry | Drop:
    return parse_entry({**GOOD, **fields}, root="/videos", index=3, source="meta.json entry 3")


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_all_fields() -> None:
    entry = parse(
        cap=["a dog", "a brown dog"],
        resolution={"height": 720, "width": 1280},
        fps=29.97,
        num_frames=120,
        cut=[10, 130],
        crop=[0, 640, 8, 368],
        motion=0.5,
    )
    assert isinstance(entry, Entry)
    assert entry.file == Path("/videos/a/clip.mp4")
    assert entry.captions == ("a dog", "a brown dog")
    assert (entry.height, entry.width, entry.fps, entry.num_frames) == (720, 1280, 29.97, 120)
    assert (entry.cut, entry.start_frame, entry.crop, entry.motion) == ((10, 130), 10, (0, 640, 8, 368), 0.5)


def test_absent_and_null_fields_are_unknown() -> None:
    for entry in (parse(), parse(resolution=None, fps=None, num_frames=None, cut=None, crop=None, motion=None)):
        assert isinstance(entry, Entry)
        assert entry.height is entry.width is entry.fps is entry.num_frames is entry.cut is entry.motion is None
        assert entry.start_frame == 0


@pytest.mark.parametrize("resolution", [{}, {"height": 720}, {"height": 0, "width": 1280}])
def test_half_a_resolution_is_none(resolution: dict[str, int]) -> None:
    entry = parse(resolution=resolution)
    assert isinstance(entry, Entry)
    assert entry.height is None and entry.width is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", None),
        ("path", ""),
        ("path", 7),
        ("cap", 7),
        ("cap", ["a", None]),
        ("resolution", "720p"),
        ("resolution", {"height": "720", "width": 1280}),
        ("fps", 0),
        ("fps", "25"),
        ("fps", float("nan")),
        ("fps", True),
        ("num_frames", 0),
        ("num_frames", 12.5),
        ("cut", [5]),
        ("cut", [5, 5]),
        ("cut", [-1, 5]),
        ("cut", {"start": 1}),
        ("crop", [0, 10, 10, 10]),
        ("crop", [0, 10, 10]),
        ("motion", "fast"),
    ],
)
def test_malformed_fields_are_named(field: str, value: Any) -> None:
    result = parse(**{field: value})
    assert isinstance(result, Drop)
    assert result.reason == "malformed_entry"
    assert "meta.json entry 3" in result.detail and field in result.detail and "it must be" in result.detail


def test_keys_are_unique_stable_and_safe(tmp_path: Path) -> None:
    entries = [
        {"path": "my clip.v2.mp4", "cap": "a", "cut": [0, 30]},
        {"path": "my clip.v2.mp4", "cap": "a", "cut": [30, 60]},
        {"path": "my clip.v2.mp4", "cap": "b", "cut": [30, 60]},
    ]
    read, _ = read_annotations(write_json(tmp_path / "meta.json", entries))
    keys = [entry.key for entry in read]
    assert len(set(keys)) == 3
    assert all("." not in key and "/" not in key and " " not in key for key in keys)
    assert all(key.startswith("my_clip_v2-") for key in keys)
    # Other annotations before it do not rename a sample.
    again, _ = read_annotations(write_json(tmp_path / "other.json", [GOOD, *entries]))
    assert [entry.key for entry in again[1:]] == keys


def test_json_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    entries, dropped = read_annotations(write_json(folder / "meta.json", [GOOD, {"cap": "no path"}, 5, GOOD]))
    assert [entry.file for entry in entries] == [folder / "a/clip.mp4"] * 2
    assert [entry.index for entry in entries] == [0, 3]
    assert [(row.entry, row.reason) for row in dropped] == [(1, "malformed_entry"), (2, "malformed_entry")]


def test_list_of_roots(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    write_json(tmp_path / "one.json", [GOOD])
    two = write_json(tmp_path / "two.json", [GOOD, GOOD])
    listing = tmp_path / "data.txt"
    listing.write_text(f"videos, one.json\n\n/elsewhere,{two}\n", encoding="utf-8")
    entries, _ = read_annotations(listing)
    assert [str(entry.file) for entry in entries] == [
        f"{tmp_path}/videos/a/clip.mp4",
        "/elsewhere/a/clip.mp4",
        "/elsewhere/a/clip.mp4",
    ]
    assert [entry.index for entry in entries] == [0, 1, 2]
    assert len({entry.key for entry in entries}) == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("meta.json", "{not json", "not valid JSON"),
        ("meta.json", '{"path": "x"}', "must be a JSON list"),
        ("meta.json", "[]", "no annotations"),
        ("data.txt", "", "is empty"),
        ("data.txt", "only_a_root\n", "line 1"),
        ("data.txt", "root,absent.json\n", "absent.json"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        read_annotations(path)
    assert "absent.json" in str(caught.value) or str(path) in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        read_annotations(tmp_path / "absent.json")
