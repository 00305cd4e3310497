"""Requests for many videos, from a file of JSON lines or a CSV file, checked by field; and the videos they ask for."""

from __future__ import annotations

import csv
import io
import json
import os
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.bounds import suggestion
from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.runtime.text import encodable, excerpt
from megatron_flashi2v.sampling.prompts import text_or_file

FIELDS = ("id", "image", "prompt", "seeds", "negative_prompt", "num_frames", "height", "width")
LONGEST_NAME = 200
"""Bytes of a file's name without its suffix; file systems hold 255, of which an unfinished file takes some."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One line of the file; None is an absent field, whose value the flags or the training data decide.

    Attributes:
        id: unique in the file; with the seed, it keys the noise.
        prompt: description of the video.
        image: file of the condition image.
        seeds: one video is made for each.
        negative_prompt: prompt to steer away from; "" is the empty prompt of training.
        num_frames: video frames.
        height: rows in pixels.
        width: columns in pixels.
        line: number of the line, from 1, for errors.
    """

    id: str
    prompt: str
    image: Path | None = None
    seeds: tuple[int, ...] | None = None
    negative_prompt: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to make.

    Attributes:
        request: what is asked for.
        seed: with the request's id, it keys all noise.
        name: of the video in the folder, without suffix; it may hold folders.
    """

    request: Request
    seed: int
    name: str


class _MalformedFieldError(Exception):
    """A field of one request is missing, or has another type or range than it must."""


def read_requests(path: Path) -> list[Request]:
    """Read a file of requests: CSV if it ends in ``.csv``, JSON lines otherwise.

    Images and ``@FILE`` of a negative prompt are looked up beside the file, then in the working directory.

    Raises:
        DataError: the file cannot be read or holds no request; or a line is malformed, repeats an id, or names a file
            that is not there.
    """
    rows = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    requests: dict[str, Request] = {}
    for line, row in rows(path, _read_text(path)):
        try:
            request = _request(row, line, path.parent)
        except _MalformedFieldError as error:
            raise DataError(f"{path}: line {line}: {error}") from None
        if request.id in requests:
            raise DataError(
                f"{path}: line {line}: id {request.id!r} is that of line {requests[request.id].line} too; ids must "
                "differ (seeds makes several videos of one request)"
            )
        requests[request.id] = request
    if not requests:
        raise DataError(f"{path}: holds no request; give at least one, with id, image and prompt")
    return list(requests.values())


def plan_jobs(requests: Sequence[Request], template: str, seed: int) -> list[Job]:
    """The videos that requests ask for, in their order, with their names.

    Args:
        requests: with different ids.
        template: such as ``{id}-{seed}``.
        seed: of requests that name none.

    Raises:
        ConfigError: the template is malformed, or a name is no file's name, leaves the folder, or is given twice.
    """
    _check_template(template)
    jobs: dict[str, Job] = {}
    for request in requests:
        for one in request.seeds or (seed,):
            job = Job(request=request, seed=one, name=_name(template, request.id, one))
            other = jobs.setdefault(job.name, job)
            if other is not job:
                raise ConfigError(
                    f"--name {template} gives two videos the name {job.name!r}: id {other.request.id!r} with seed "
                    f"{other.seed}, and id {request.id!r} with seed {one}; use {{id}} and {{seed}} so that names differ"
                )
    return list(jobs.values())


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: line {number} is {_excerpt(line)}; it must be a JSON object with id and prompt"
            )
        yield number, {name: value for name, value in row.items() if value is not None}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = _header(path, [cell.strip() for cell in cells])
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells for the header's {len(header)}; quote a "
                    "cell that holds a comma"
                )
            yield reader.line_num, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is no CSV ({error}); mend its quotes") from None


def _delimiter(text: str) -> str:
    """What divides the columns of the first line: a comma, or what spreadsheets write in its place."""
    first = text.lstrip().partition("\n")[0]
    fit = (mark for mark in ",;\t" if {"id", "prompt"} <= {name.strip(' "\r') for name in first.split(mark)})
    return next(fit, ",")


def _header(path: Path, names: list[str]) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: the header names the column {name!r} twice; keep one of them")
    for name in ("id", "prompt"):
        if name not in names:
            raise DataError(f"{path}: the header is {','.join(names)}; it must name the columns id and prompt")
    return names


def _request(row: dict[str, Any], line: int, folder: Path) -> Request:
    for name in row:
        if name not in FIELDS:
            known = suggestion(name, FIELDS) or f"; known are {', '.join(FIELDS)}"
            raise _MalformedFieldError(f"unknown field {name!r}{known}")
    identity = row.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if isinstance(identity, str):
        identity = encodable(identity)
    if not isinstance(identity, str) or not identity.strip():
        raise _MalformedFieldError(f"id is {_excerpt(identity)}; it must be a word of its own")
    return Request(
        id=identity, prompt=_text(row, "prompt", required=True) or "", image=_image(row, folder), seeds=_seeds(row),
        negative_prompt=_negative_prompt(row, folder), num_frames=_size(row, "num_frames"),
        height=_size(row, "height"), width=_size(row, "width"), line=line,
    )


def _text(row: dict[str, Any], name: str, *, required: bool = False) -> str | None:
    value = row.get(name)
    if isinstance(value, str):
        return encodable(value)
    if value is None and not required:
        return None
    shown = "missing" if value is None else _excerpt(value)
    raise _MalformedFieldError(f"{name} is {shown}; it must be a text")


def _negative_prompt(row: dict[str, Any], folder: Path) -> str | None:
    given = _text(row, "negative_prompt")
    if given is None or not given.startswith("@"):
        return given
    name = Path(given[1:]).expanduser()
    path = next((path for path in (folder / name, name) if os.path.isfile(path)), None)
    if path is None:
        raise _MalformedFieldError(
            f"negative_prompt {_excerpt(given)}: no such file, beside the requests or in the working directory; after "
            "@ give a file of text in UTF-8, or give the prompt itself"
        )
    try:
        return text_or_file(f"@{path}", "negative_prompt")
    except ConfigError as error:
        raise _MalformedFieldError(str(error)) from None


def _image(row: dict[str, Any], folder: Path) -> Path | None:
    name = row.get("image")
    if name is None:
        return None
    if not isinstance(name, str) or not name or "\0" in name:
        raise _MalformedFieldError(f"image is {_excerpt(name)}; it must be the path of a picture or a video")
    for path in (folder / name, Path(name)):
        if os.path.isfile(path):
            return path
    raise _MalformedFieldError(
        f"image {_excerpt(name)}: no such file, beside the requests or in the working directory; give a picture "
        "(png, jpg) or a video, whose first frame is used"
    )


def _seeds(row: dict[str, Any]) -> tuple[int, ...] | None:
    value = row.get("seeds")
    if value is None:
        return None
    seeds = value.split() if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        found = tuple(int(seed) if isinstance(seed, str) else seed for seed in seeds)
    except ValueError:
        found = ()
    if not found or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in found):
        raise _MalformedFieldError(
            f"seeds is {_excerpt(value)}; it must be a list of whole numbers (in CSV with spaces between)"
        )
    if len(set(found)) < len(found):
        raise _MalformedFieldError(f"seeds is {_excerpt(value)}; it must name each seed once")
    return found


def _size(row: dict[str, Any], name: str) -> int | None:
    value = row.get(name)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise _MalformedFieldError(f"{name} is {_excerpt(value)}; it must be a whole number, at least 1")
    return value


def _check_template(template: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"--name {template}: {error}; write {{id}} and {{seed}} with both braces") from None
    for _, field, spec, conversion in parts:
        if field is not None and (field not in ("id", "seed") or conversion or "{" in (spec or "")):
            raise ConfigError(f"--name {template}: {{{field}}} is not filled in; there are {{id}} and {{seed}}")


def _name(template: str, identity: str, seed: int) -> str:
    try:
        name = template.format(id=identity, seed=seed)
    except ValueError as error:
        raise ConfigError(f"--name {template}: {error}; leave the format out") from None
    parts = name.split("/")
    problem = ""
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable():
        problem = "is no file's name in the folder"
    elif max(len(part.encode()) for part in parts) > LONGEST_NAME:
        problem = f"is longer than {LONGEST_NAME} bytes"
    if problem:
        raise ConfigError(
            f"--name {template} gives id {_excerpt(identity)} the name {_excerpt(name)}, which {problem}; "
            "change the id or --name"
        )
    return name


def _excerpt(value: Any) -> str:
    """A value for a message, shortened."""
    return excerpt(repr(value))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--requests {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--requests {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
