"""Annotations in the schema of FlashI2V's ``flashi2v/data/utils/wan_utils.py`` (branch main), checked by field.

An annotation is an object with ``path`` and ``cap``, and optionally ``resolution``, ``fps``, ``num_frames``, ``cut``,
``crop`` and ``motion``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.annotation_files import MAX_FIELD, SCHEMA, raw_entries
from megatron_flashi2v.data.reasons import Drop, DroppedEntry
from megatron_flashi2v.runtime.text import encodable, excerpt, shown

MAX_PATH = 4096
"""Characters of a path; Linux takes no more bytes."""
MAX_NUMBER = 2.0**53
"""Greatest number in any field; float64 holds whole numbers exactly up to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One annotation; an absent field is None. Frame numbers count the file's frames from 0.

    Attributes:
        index: number over all annotation files, from 0.
        source: annotation file and number in it, for people.
        key: name of the sample; unique, and the same wherever the annotation stands in its file. Draws made while
            preparing are keyed by it.
        root: folder that ``path`` is relative to.
        path: the video's path as annotated.
        captions: one or more captions of the clip; one of them is drawn.
        height: pixels.
        width: pixels.
        fps: frames per second.
        num_frames: frames of the clip.
        cut: first frame, and the frame after the last one (None: open).
        crop: (x_start, x_end, y_start, y_end) in pixels of the upright picture, before its pixels are made square.
        motion: motion score.
    """

    index: int
    source: str
    key: str
    root: str
    path: str
    captions: tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    cut: tuple[int, int | None] | None = None
    crop: tuple[int, int, int, int] | None = None
    motion: float | None = None

    @property
    def file(self) -> Path:
        """Path of the video file."""
        return Path(self.root, self.path)

    @property
    def shown_path(self) -> str:
        """The path as it may be written down."""
        return shown(self.path)

    @property
    def start_frame(self) -> int:
        """First frame of the clip in the file."""
        return self.cut[0] if self.cut else 0

    def dropped(self, drop: Drop) -> DroppedEntry:
        """This annotation on the list of those that gave no sample."""
        return DroppedEntry(
            entry=self.index, source=self.source, path=self.path, reason=drop.reason, detail=drop.detail
        )


class _MalformedFieldError(Exception):
    """A field of one annotation has another type or range than it must."""


def read_annotations(path: Path) -> tuple[list[Entry], list[DroppedEntry]]:
    """Read annotations (:func:`~megatron_flashi2v.data.annotation_files.raw_entries` says of what kinds of file).

    Returns:
        The well-formed annotations in order, and those with a missing or malformed field.

    Raises:
        DataError: a file is missing or holds something else, or there are no annotations.
    """
    entries: list[Entry] = []
    dropped: list[DroppedEntry] = []
    keys: Counter[str] = Counter()
    for index, raw in enumerate(raw_entries(path)):
        if raw.problem is not None:
            result: Entry | Drop = Drop("malformed_entry", f"{raw.source}: {raw.problem}")
        else:
            result = parse_entry(raw.value, root=raw.root, index=index, source=raw.source)
        if isinstance(result, Entry):
            entries.append(_with_unique_key(result, keys))
            continue
        named = raw.value.get("path") if isinstance(raw.value, dict) else None
        dropped.append(
            DroppedEntry(
                entry=index, source=raw.source, path=named if isinstance(named, str) else "", reason=result.reason,
                detail=result.detail,
            )
        )  # fmt: skip
    if not entries and not dropped:
        raise DataError(f"--annotations {path}: holds no annotations; it must be {SCHEMA}")
    return entries, dropped


def parse_entry(raw: Any, *, root: Path | str, index: int, source: str) -> Entry | Drop:
    """Check one annotation's fields.

    Args:
        raw: what the JSON file holds.
        root: folder that its path is relative to.
        index: its number over all files.
        source: file and number in it, for people.

    Returns:
        The entry, or why it is malformed.
    """
    if not isinstance(raw, dict):
        return Drop("malformed_entry", f"{source}: is {_shown(raw)}; it must be an object with path and cap")
    try:
        path = raw.get("path")
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise _MalformedFieldError(f"path is {_shown(path)}; it must be the path of a video file")
        if len(path) > MAX_PATH:
            raise _MalformedFieldError(f"path has {len(path):,} characters; it must have at most {MAX_PATH:,}")
        height, width = _resolution(raw.get("resolution"))
        cut, crop = _cut(raw.get("cut")), _crop(raw.get("crop"))
        return Entry(
            index=index,
            source=source,
            key=_sample_key(path, cut, crop),
            root=str(root),
            path=path,
            captions=_captions(raw.get("cap")),
            height=height,
            width=width,
            fps=_number("fps", raw.get("fps"), above=0.0),
            num_frames=_integer("num_frames", raw.get("num_frames"), least=1),
            cut=cut,
            crop=crop,
            motion=_number("motion", raw.get("motion")),
        )
    except _MalformedFieldError as error:
        return Drop("malformed_entry", f"{source}: {error}")


def _sample_key(path: str, cut: tuple[int, int | None] | None, crop: tuple[int, int, int, int] | None) -> str:
    """A readable, stable name: the file's stem and a hash of what picks the clip (not of where the data lie)."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).stem)[:40].strip("_") or "clip"
    digest = hashlib.sha256(json.dumps([path, cut, crop]).encode()).hexdigest()[:16]
    return f"{stem}-{digest}"


def _with_unique_key(entry: Entry, keys: Counter[str]) -> Entry:
    keys[entry.key] += 1
    count = keys[entry.key]
    if count == 1:
        return entry
    return dataclasses.replace(entry, key=f"{entry.key}-{count}")


def _captions(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise _MalformedFieldError(f"cap is {_shown(value)}; it must be a string or a list of strings")
    longest = max(map(len, captions), default=0)
    if longest > MAX_FIELD:
        raise _MalformedFieldError(f"cap has {longest:,} characters; it must have at most {MAX_FIELD:,}")
    return tuple(map(encodable, captions))


def _resolution(value: Any) -> tuple[int | None, int | None]:
    if value is None:
        return None, None
    if not isinstance(value, dict):
        raise _MalformedFieldError(f"resolution is {_shown(value)}; it must be an object with height and width")
    height = _integer("resolution.height", value.get("height"))
    width = _integer("resolution.width", value.get("width"))
    # A size of 0 is how data sets say that they do not know; half a size is no size.
    if height is None or width is None or height <= 0 or width <= 0:
        return None, None
    return height, width


def _cut(value: Any) -> tuple[int, int | None] | None:
    if value is None:
        return None
    rule = "it must be [start, end] in frames, 0 <= start < end"
    if not isinstance(value, list) or len(value) != 2:
        raise _MalformedFieldError(f"cut is {_shown(value)}; {rule}")
    start, end = _integer("cut[0]", value[0], least=0), _integer("cut[1]", value[1])
    if start is None or (end is not None and end <= start):
        raise _MalformedFieldError(f"cut is {_shown(value)}; {rule}")
    return start, end


def _crop(value: Any) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    rule = "it must be [x_start, x_end, y_start, y_end] in pixels, each start >= 0 and below its end"
    if not isinstance(value, list) or len(value) != 4:
        raise _MalformedFieldError(f"crop is {_shown(value)}; {rule}")
    sides = [_integer("crop", side, least=0) for side in value]
    x_start, x_end, y_start, y_end = sides
    if x_start is None or x_end is None or y_start is None or y_end is None or x_start >= x_end or y_start >= y_end:
        raise _MalformedFieldError(f"crop is {_shown(value)}; {rule}")
    return x_start, x_end, y_start, y_end


def _integer(name: str, value: Any, *, least: int | None = None) -> int | None:
    number = _number(name, value)
    if number is None:
        return None
    if number != int(number) or (least is not None and number < least):
        limit = "" if least is None else f" of at least {least}"
        raise _MalformedFieldError(f"{name} is {_shown(value)}; it must be a whole number{limit}")
    return int(number)


def _number(name: str, value: Any, *, above: float | None = None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_NUMBER:
        raise _MalformedFieldError(f"{name} is {_shown(value)}; it must be a number")
    if above is not None and value <= above:
        raise _MalformedFieldError(f"{name} is {_shown(value)}; it must be above {above:g}")
    return float(value)


def _shown(value: Any) -> str:
    """The value as JSON, shortened."""
    return "missing" if value is None else excerpt(json.dumps(value, ensure_ascii=False))
