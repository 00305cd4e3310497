"""The files that annotations stand in: JSON lists, JSON lines, CSV, folders of videos with a text each, lists of these.

What one line holds never stops the others: one that is too long, not UTF-8 or misshapen is a problem of its own.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.runtime.text import excerpt

MAX_LINE = 2**20
"""Bytes of one line of JSON lines or CSV."""
MAX_FIELD = 2**17
"""Characters of one field; the csv module's own limit."""

SCHEMA = (
    'a JSON list, JSON lines or CSV of clips such as {"path": "videos/cat.mp4", "cap": "A cat sits."}, a folder of '
    "videos with a .txt each, or a text file of lines root_dir,meta.json"
)
"""What annotations may be."""

VIDEO_ENDINGS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".3gp", ".ogv", ".gif",
)  # fmt: skip
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

_ABSENT = ("nan", "null", "none")
"""Cells of tables that say that they hold nothing."""
_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RawEntry:
    """One annotation as it stands in its file.

    Attributes:
        root: folder that its path is relative to.
        source: file and number in it, for people.
        value: what stands there; a dictionary if all is well.
        problem: why nothing could be read; None where ``value`` was.
    """

    root: Path
    source: str
    value: Any = None
    problem: str | None = None


def raw_entries(path: Path) -> Iterator[RawEntry]:
    """The annotations of a file, a folder, or all files that a list names.

    Args:
        path: paths in a file are relative to its folder; those of a list are looked up beside the list, then in the
            working directory.

    Raises:
        DataError: the file, or one that it names, is missing or holds something else.
    """
    if path.is_dir() or _kind(path) != "list":
        yield from _entries(path.parent, path)
        return
    for root, file in _read_list(path):
        yield from _entries(root, file)


def _entries(root: Path, path: Path) -> Iterator[RawEntry]:
    if path.is_dir():
        yield from _folder_entries(path)
        return
    kind = _kind(path)
    if kind == "list":
        raise DataError(f"annotation file {path}: holds no annotations; it must be {SCHEMA}")
    yield from {"json": _json_entries, "lines": _line_entries, "csv": _csv_entries}[kind](root, path)


def _kind(path: Path) -> str:
    """What a file is, by its ending and its first line: json, lines, csv or list.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    ending = path.suffix.lower()
    try:
        with path.open("rb") as file:
            first = file.readline(MAX_LINE)
            while first and not first.strip():
                first = file.readline(MAX_LINE)
    except OSError as error:
        raise DataError(f"annotation file {path}: cannot be read ({error.strerror}); it must be {SCHEMA}") from error
    for mark, name in _MARKS.items():
        if first.startswith(mark):
            raise DataError(f"annotation file {path}: is {name}; it must be UTF-8 text")
    if ending in (".jsonl", ".ndjson"):
        return "lines"
    if ending in (".csv", ".tsv"):
        return "csv"
    line = first.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").strip()
    if line.startswith("{"):
        value = _parsed(line)
        return "lines" if isinstance(value, dict) and (ending != ".json" or "path" in value) else "json"
    if ending == ".json" or re.match(r"\[\s*(\{|\]|$)", line):
        return "json"
    return "list" if _delimiter(line) is None else "csv"


def _delimiter(header: str) -> str | None:
    """What divides the columns that a first line names; None where path and cap are not among them.

    Spreadsheets write semicolons where a comma is the decimal sign.
    """
    return next(
        (mark for mark in ",\t;" if {"path", "cap"} <= {name.strip(' "') for name in header.split(mark)}), None
    )


def _parsed(text: str) -> Any:
    """The value of JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_list(path: Path) -> list[tuple[Path, Path]]:
    """Roots and files of a text file of lines ``root_dir,meta.json``; quotes enclose a name with a comma."""
    lines = _Lines(path)
    sources = []
    for number, row in _rows(csv.reader(lines, skipinitialspace=True, strict=True), lines):
        parts = [part.strip() for part in row] if isinstance(row, list) else []
        if len(parts) != 2 or not all(parts):
            found = row if isinstance(row, str) else f"is {excerpt(','.join(parts))!r}"
            raise DataError(
                f"--annotations {path}: line {number} {found}; it must be root_dir,meta.json "
                f'("..." around a name with a comma). Annotations are {SCHEMA}'
            )
        root, file = (_resolve(part, path.parent) for part in parts)
        sources.append((root, file))
    if not sources:
        raise DataError(f"--annotations {path}: is empty; it must be {SCHEMA}")
    return sources


def _resolve(part: str, folder: Path) -> Path:
    beside = folder / part
    return beside if beside.exists() else Path(part)


def _json_entries(root: Path, path: Path) -> Iterator[RawEntry]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"annotation file {path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotation file {path}: not valid JSON ({error}); it must be {SCHEMA}") from error
    if not isinstance(values, list):
        found = f"an object with {', '.join(list(values)[:4])}" if isinstance(values, dict) else type(values).__name__
        raise DataError(f"annotation file {path}: is {found}; it must be {SCHEMA}")
    for number, value in enumerate(values):
        yield RawEntry(root=root, source=f"{path} entry {number}", value=value)


def _line_entries(root: Path, path: Path) -> Iterator[RawEntry]:
    lines = _Lines(path)
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except _LineError as error:
            yield RawEntry(root=root, source=f"{path} line {lines.number}", problem=str(error))
            continue
        if line.strip():
            value = _parsed(line)
            problem = None if value is not None else f"is {excerpt(line.strip())!r}; it must be a JSON object"
            yield RawEntry(root=root, source=f"{path} line {lines.number}", value=value, problem=problem)


def _csv_entries(root: Path, path: Path) -> Iterator[RawEntry]:
    lines = _Lines(path)
    with path.open("rb") as file:
        first = file.readline(MAX_LINE).removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").strip()
    delimiter = _delimiter(first) or ","
    rows = _rows(csv.reader(lines, delimiter=delimiter, strict=True), lines)
    header = next((row for _, row in rows), "is empty")
    if not isinstance(header, list):
        raise DataError(f"annotation file {path}: {header}; its first line must name the columns path and cap")
    names = [name.strip() for name in header]
    if not {"path", "cap"} <= set(names):
        raise DataError(
            f"annotation file {path}: its columns are {excerpt(', '.join(names))}; it must have path and cap, and may "
            "have fps, num_frames, height, width, cut, crop and motion; rename them in its first line"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"annotation file {path}: its first line names the column {twice!r} twice; keep one of them")
    for number, row in rows:
        source = f"{path} line {number}"
        if isinstance(row, str):
            yield RawEntry(root=root, source=source, problem=row)
        elif len(row) != len(names):
            problem = (
                f'has {len(row)} fields, the first line {len(names)}; "..." must enclose a field with a {delimiter!r}'
            )
            yield RawEntry(root=root, source=source, problem=problem)
        else:
            yield RawEntry(root=root, source=source, value=_from_cells(dict(zip(names, row, strict=True))))


def _from_cells(cells: dict[str, str]) -> dict[str, Any]:
    """A row as the object that a JSON file would hold; empty cells are absent."""
    values = {name: _from_cell(name, cell) for name, cell in cells.items() if cell.strip()}
    if "height" in values or "width" in values:
        values["resolution"] = {"height": values.get("height"), "width": values.get("width")}
    return values


def _from_cell(name: str, cell: str) -> Any:
    """Numbers and lists are written as in JSON; several captions are a list too."""
    if name == "path" or (name == "cap" and not cell.lstrip().startswith("[")):
        return cell
    value = _parsed(cell)
    if name == "cap":
        texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
        return value if texts else cell
    if cell.strip().lower() in _ABSENT:
        return None
    return cell if value is None else value


def _folder_entries(folder: Path) -> Iterator[RawEntry]:
    """Videos with the text of the same name beside each; a picture counts where there is no video of its name."""
    found = False
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        videos = {Path(name).stem for name in names if _ends(name, VIDEO_ENDINGS)}
        for name in sorted(names):
            shown_by_video = _ends(name, PICTURE_ENDINGS) and Path(name).stem in videos
            if name.startswith(".") or not _ends(name, VIDEO_ENDINGS + PICTURE_ENDINGS) or shown_by_video:
                continue
            found = True
            path = Path(parent, name)
            value = {"path": str(path.relative_to(folder))}
            text = path.with_suffix(".txt")
            problem = None
            if text.exists():
                try:
                    value["cap"] = _caption_file(text)
                except _LineError as error:
                    problem = f"{text.name} {error}"
            yield RawEntry(root=folder, source=str(path), value=value, problem=problem)
    if not found:
        raise DataError(f"--annotations {folder}: is a folder without videos; it must be {SCHEMA}")


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings)


def _caption_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(4 * MAX_FIELD + 1)
    except OSError as error:
        raise _LineError(f"cannot be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = ""
        if len(data) <= 4 * MAX_FIELD:
            raise _LineError("is not UTF-8 text; save it as UTF-8") from None
    if len(data) > 4 * MAX_FIELD or len(text) > MAX_FIELD:
        raise _LineError(f"has more than {MAX_FIELD:,} characters")
    return text.strip()


class _LineError(Exception):
    """A line cannot be used; those after it can."""


class _Lines:
    """The lines of a text file; one that cannot be used raises a :class:`_LineError`, and the next call goes on.

    Attributes:
        number: of the line that was given last, from 1.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = b"" if self._file.closed else self._file.readline(MAX_LINE + 1)
        if not line:  # a reader of CSV asks once more after quotes that are never closed
            self._file.close()
            raise StopIteration
        self.number += 1
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(MAX_LINE)
            raise _LineError(f"has more than {MAX_LINE:,} bytes")
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            raise _LineError("is not UTF-8 text; save the file as UTF-8") from None


def _rows(reader: Iterator[list[str]], lines: _Lines) -> Iterator[tuple[int, list[str] | str]]:
    """Rows that are not blank with the number of their first line, or what is wrong with one."""
    while True:
        number = lines.number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except _LineError as error:
            yield number, str(error)
            continue
        except csv.Error as error:
            yield number, f"is no CSV ({error}); mend its quotes, or shorten the cell"
            continue
        if any(cell.strip() for cell in row):
            yield number, row
