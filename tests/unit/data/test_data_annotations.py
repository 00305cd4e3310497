"""Annotation files: what is accepted, and what an error says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.annotation_files import MAX_FIELD, MAX_LINE
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


def test_captions_have_a_mark_for_what_cannot_be_encoded() -> None:
    entry = parse(cap=["a \ud83d b", "caf\udce9"])
    assert isinstance(entry, Entry) and entry.captions == ("a \ufffd b", "caf\ufffd")


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
        ("meta.json", '{"videos": [], "info": 1}', "is an object with videos, info; it must be a JSON list"),
        ("meta.json", '[{"path": "x"},', "not valid JSON"),
        ("meta.json", "5", "is int; it must be a JSON list"),
        ("meta.json", "[]", "no annotations"),
        ("data.txt", "", "is empty"),
        ("data.txt", "only_a_root\n", "line 1"),
        ("data.txt", "root,absent.json\n", "absent.json"),
        ("data.txt", "root,nested.txt\n", "nested.txt: holds no annotations"),
        ("data.txt", "a,b,meta.json\n", r'line 1 is .*"\.\.\." around a name with a comma'),
        ("data.txt", "a video of a cat\n", r'Annotations are a JSON list, .* \{"path": "videos/cat\.mp4", "cap": "A'),
        ("meta.csv", "video,caption\na.mp4,a\n", "its columns are video, caption; it must have path and cap"),
        ("meta.csv", "", "is empty; its first line must name the columns path and cap"),
        ("meta.csv", '"path,cap\n', "its first line must name the columns"),
        ("meta.txt", "\x1f\x8b", "not UTF-8|is gzip"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    (tmp_path / "nested.txt").write_text("a, b")
    with pytest.raises(DataError, match=said) as caught:
        read_annotations(path)
    assert str(tmp_path if "nested" in said else path) in str(caught.value) or "absent.json" in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        read_annotations(tmp_path / "absent.json")


CLIPS = [
    {"path": "a/clip.mp4", "cap": "a dog, running"},
    {
        "path": "b,c.mp4", "cap": ["a cat", 'a "cat"'], "fps": 29.97, "num_frames": 120, "cut": [10, 130],
        "resolution": {"height": 720, "width": 1280}, "crop": [0, 640, 8, 368], "motion": 0.5,
    },
    {"path": "nur ein Stück.mp4", "cap": "two\nlines"},
]  # fmt: skip


def as_csv(path: Path, delimiter: str = ",", mark: str = "") -> Path:
    """The clips as spreadsheets write them: numbers as text, lists as JSON, sizes in columns of their own."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["cap", "path", "fps", "num_frames", "height", "width", "cut", "crop", "motion", "licence"])
        for clip in CLIPS:
            size = clip.get("resolution", {"height": "", "width": ""})
            caption = clip["cap"] if isinstance(clip["cap"], str) else json.dumps(clip["cap"])
            lists = [json.dumps(clip[name]) if name in clip else "" for name in ("cut", "crop")]
            writer.writerow([
                caption, clip["path"], clip.get("fps", ""), clip.get("num_frames", ""), size["height"], size["width"],
                *lists, clip.get("motion", "nan"), "CC0",
            ])  # fmt: skip
    return path


def facts(path: Path) -> list[dict[str, Any]]:
    """Everything but where it stood."""
    entries, dropped = read_annotations(path)
    assert dropped == []
    return [{name: getattr(entry, name) for name in Entry.__slots__ if name != "source"} for entry in entries]


def test_every_kind_of_file_gives_the_same_entries(tmp_path: Path) -> None:
    expected = facts(write_json(tmp_path / "meta.json", CLIPS))
    lines = "".join(json.dumps(clip, ensure_ascii=False) + "\n\n" for clip in CLIPS)
    for name in ("meta.jsonl", "lines.json", "lines.txt"):
        (tmp_path / name).write_text("\ufeff" + lines, encoding="utf-8")
        assert facts(tmp_path / name) == expected, name
    assert facts(as_csv(tmp_path / "meta.csv")) == expected
    assert facts(as_csv(tmp_path / "marked.csv", mark="\ufeff")) == expected
    assert facts(as_csv(tmp_path / "meta.tsv", delimiter="\t")) == expected
    assert facts(as_csv(tmp_path / "table.txt")) == expected
    (tmp_path / "list.txt").write_text(".,meta.jsonl\n.,meta.csv\n", encoding="utf-8")
    twice = facts(tmp_path / "list.txt")
    assert [fact["path"] for fact in twice] == 2 * [fact["path"] for fact in expected]


def test_a_folder_of_videos_with_a_text_each(tmp_path: Path) -> None:
    for name in ("b/two.MP4", "one.mkv", "one.jpg", "still.png", ".hidden.mp4", "notes.md", "odd.mp4", "bare.webm",
                 "long.mp4", ".cache/x.mp4"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    texts = {"b/two": "\ufeffa dog\n", "one": "a cat", "still": "a still", "lone": "x"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "odd.txt").write_bytes("Stück".encode("latin-1"))
    (tmp_path / "long.txt").write_text("w" * (MAX_FIELD + 1))
    entries, dropped = read_annotations(tmp_path)
    assert {entry.path: entry.captions for entry in entries} == {
        "bare.webm": None, "one.mkv": ("a cat",), "still.png": ("a still",), "b/two.MP4": ("a dog",),
    }  # fmt: skip
    assert all(entry.file.exists() for entry in entries)
    assert [(row.path, row.detail.split(": ", 1)[1]) for row in dropped] == [
        ("long.mp4", f"long.txt has more than {MAX_FIELD:,} characters"),
        ("odd.mp4", "odd.txt is not UTF-8 text; save it as UTF-8"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: is a folder without videos; it must be a JSON list"):
        read_annotations(tmp_path / "empty")
    (tmp_path / "list.txt").write_text(f'ignored,"{tmp_path / "b"}"\n')
    assert [entry.file for entry in read_annotations(tmp_path / "list.txt")[0]] == [tmp_path / "b" / "two.MP4"]


def test_one_bad_line_stops_no_other(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    long = b'{"path": "x", "cap": "' + b"w" * MAX_LINE + b'"}'
    lines = [good, long, '{"path": "Stück"}'.encode("latin-1"), b'{"path": "torn', b"[1]", b"null", good]
    (tmp_path / "meta.jsonl").write_bytes(b"\n".join(lines))
    entries, dropped = read_annotations(tmp_path / "meta.jsonl")
    assert [entry.index for entry in entries] == [0, 6]
    said = [row.detail.partition("meta.jsonl ")[2] for row in dropped]
    assert said[0] == f"line 2: has more than {MAX_LINE:,} bytes"
    assert said[1] == "line 3: is not UTF-8 text; save the file as UTF-8"
    assert said[2].startswith("line 4: is '") and said[2].endswith("torn'; it must be a JSON object")
    assert said[3] == "line 5: is [1]; it must be an object with path and cap"
    assert said[4].startswith("line 6: is 'null'")


def test_one_bad_row_stops_no_other(tmp_path: Path) -> None:
    rows = [b"path,cap,fps", b"a.mp4,a dog,24", b"b.mp4,a, b,24", b"c.mp4,St\xfcck,24", b"d.mp4,a,fast",
            b"e.mp4," + b"w" * (MAX_FIELD + 1) + b",24", b"f.mp4,a " + b"w" * MAX_LINE, b'g.mp4,"a" b,24',
            b'h.mp4,"two', b'lines",24', b"i.mp4,a,"]  # fmt: skip
    (tmp_path / "meta.csv").write_bytes(b"\r\n".join(rows))
    entries, dropped = read_annotations(tmp_path / "meta.csv")
    assert [(entry.path, entry.source.rpartition(" ")[2]) for entry in entries] == [
        ("a.mp4", "2"), ("h.mp4", "9"), ("i.mp4", "11"),
    ]  # fmt: skip
    said = [row.detail.partition("meta.csv ")[2] for row in dropped]
    assert "line 3: has 4 fields, the first line 3" in said[0]
    assert said[1] == "line 4: is not UTF-8 text; save the file as UTF-8"
    assert said[2] == 'line 5: fps is "fast"; it must be a number'
    assert said[3].startswith("line 6: is no CSV (field larger than field limit")
    assert said[4] == f"line 7: has more than {MAX_LINE:,} bytes"
    assert said[5].startswith("line 8: ")


def test_semicolons_of_spreadsheets_divide_columns_too(tmp_path: Path) -> None:
    (tmp_path / "meta.csv").write_text('"path";cap\r\na.mp4;a dog, running\r\n', encoding="utf-8-sig")
    (tmp_path / "meta.txt").write_text("path;cap\na.mp4;a dog, running\n")
    for name in ("meta.csv", "meta.txt"):
        entries, dropped = read_annotations(tmp_path / name)
        assert [(entry.path, entry.captions) for entry in entries] == [("a.mp4", ("a dog, running",))] and not dropped


def test_quotes_that_are_never_closed_cost_their_row(tmp_path: Path) -> None:
    (tmp_path / "meta.csv").write_text('path,cap\na.mp4,a dog\nb.mp4,"a cat\nc.mp4,a cow\n')
    entries, (dropped,) = read_annotations(tmp_path / "meta.csv")
    assert [entry.path for entry in entries] == ["a.mp4"]
    assert "meta.csv line 3: is no CSV (unexpected end of data); mend its quotes" in dropped.detail


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.csv").write_text("path,cap,path\na.mp4,a dog,b.mp4\n")
    with pytest.raises(DataError, match="names the column 'path' twice; keep one of them"):
        read_annotations(tmp_path / "meta.csv")


def test_a_video_given_as_annotations_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom\xff\xfe\n")
    with pytest.raises(DataError, match=r"a\.mp4: line 1 is not UTF-8 text; save the file as UTF-8; it must be"):
        read_annotations(tmp_path / "a.mp4")


def test_a_folder_with_a_comma_can_be_listed(tmp_path: Path) -> None:
    folder = tmp_path / "cats, dogs"
    folder.mkdir()
    write_json(folder / "meta.json", [GOOD])
    (tmp_path / "list.txt").write_text('"cats, dogs", "cats, dogs/meta.json"\n', encoding="utf-8")
    entries, _ = read_annotations(tmp_path / "list.txt")
    assert [entry.file for entry in entries] == [folder / "a/clip.mp4"]
