"""Writes files that are whole under their final name, and reads files with clear errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import ConfigError, UserError, WriteError
from megatron_flashi2v.runtime.text import to_utf8

NAME_BYTES = 255
"""Of a file's name, on all usual file systems."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MIB = 1024**2

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def full_disk_named(path: Path | str) -> Iterator[None]:
    """Turn the error of a full disk into a :class:`WriteError` that names ``path`` and the free space.

    Recognises it also inside the errors of libraries (safetensors, torch's checkpoint writer). Other errors pass.
    """
    path = Path(path)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise WriteError(
            f"{path}: the disk is full ({_free_mib(path)} MiB free); free some space or choose another path, "
            "then start again"
        ) from error


def require_space(path: Path | str, needed: int, what: str) -> None:
    """Refuse to begin work that would fill the disk.

    Args:
        path: the file or folder to write.
        needed: bytes.
        what: the work, for the message.

    Raises:
        UserError: the disk of ``path`` has fewer bytes free.
    """
    free = _free_mib(Path(path))
    wanted = -(-needed // _MIB)
    if wanted > free:
        raise UserError(
            f"{path}: {what} needs {wanted:,} MiB of disk, of which {free:,} MiB are free; free some space or choose "
            "another path"
        )


def require_writable(path: Path, name: str, *, folder: bool = False) -> None:
    """Refuse, before the work, an output that could not be written after it.

    Args:
        path: of a file; folders that lead to it may be missing.
        name: what the error calls it, such as ``--report``.
        folder: it is the path of a folder instead.

    Raises:
        ConfigError: the path is a folder (or none), or lies in something that is no folder or may not be written.
    """
    if path.is_dir() and not folder:
        raise ConfigError(f"{name} {path} is a folder; give a file's name in it")
    parents = path.absolute().parents
    existing = next(place for place in ((path, *parents) if folder else parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} {path} cannot be written: {existing} is no folder, or not a writable one")


@contextlib.contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """As :func:`full_disk_named`, and for any error of the operating system, such as a missing permission.

    The body must only write ``path``: the message would blame another file's error on it.
    """
    try:
        with full_disk_named(path):
            yield
    except OSError as error:
        if error.errno is None:
            raise
        raise WriteError(f"{path}: cannot be written: {os.strerror(error.errno)}") from error


def name_beside(name: str, before: str = "", after: str = "") -> str:
    """A name for what stands beside a file or folder for a while, such as the part of it that is written.

    ``NAME`` between ``before`` and ``after``; where no file system takes that many bytes, the beginning of the name and
    its hash. The same name always gives the same one.
    """
    encoded = os.fsencode(name)
    room = NAME_BYTES - len(os.fsencode(before + after))
    if len(encoded) > room:
        mark = f"~{hashlib.sha256(encoded).hexdigest()[:16]}"
        name = encoded[: room - len(mark)].decode("utf-8", errors="ignore") + mark
    return f"{before}{name}{after}"


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file that appears under its name only when it is whole; replaces an older one.

    Makes missing parent folders.

    Raises:
        UserError: the disk is full or the path cannot be written; an older file is unchanged then.
    """
    path = Path(path)
    temporary = path.with_name(name_beside(path.name, ".", f".{secrets.token_hex(4)}.partial"))
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def atomic_write_text(path: Path | str, text: str) -> None:
    """:func:`atomic_write_bytes` of UTF-8 text; U+FFFD stands for what has no bytes in it."""
    atomic_write_bytes(path, to_utf8(text))


def atomic_write_json(path: Path | str, value: Any) -> None:
    """:func:`atomic_write_bytes` of indented JSON; floats keep full precision (NaN is written as ``NaN``)."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: a power failure may undo a rename that was not flushed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path | str, *, error: type[UserError] = UserError) -> Any:
    """Read the value of a JSON file.

    Args:
        path: a UTF-8 file.
        error: class of the errors raised, such as ``CheckpointError``.

    Raises:
        UserError: (``error``) the file is missing, cannot be read, or is not JSON; the message gives the place.
    """
    text = _read_text(Path(path), error)
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(
            f"{path}: not valid JSON at line {problem.lineno}, column {problem.colno} ({problem.msg})"
        ) from problem
    except RecursionError:
        raise error(f"{path}: nested too deeply for a file of this project") from None


def read_json_object(path: Path | str, *, error: type[UserError] = UserError) -> dict[str, Any]:
    """Read a file that must hold a JSON object.

    Raises:
        UserError: (``error``) as :func:`read_json`, or the value has another type.
    """
    value = read_json(path, error=error)
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def append_jsonl(path: Path | str, row: Mapping[str, Any]) -> None:
    """Append one row to a JSON-lines file, in one write; makes missing parent folders.

    Removes a torn last line first, which a killed run left.

    Raises:
        UserError: the disk is full or the path cannot be written; the file's earlier rows are unchanged then.
    """
    path = Path(path)
    line = to_utf8(json.dumps(dict(row), ensure_ascii=False)) + b"\n"
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            _end_last_line(file)
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise


def read_jsonl(path: Path | str, *, error: type[UserError] = UserError) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file, without a torn last line, which a killed run left.

    Raises:
        UserError: (``error``) the file is missing, or another line than the last is not a JSON object; the
            message names the line.
    """
    lines = _read_text(Path(path), error, torn_end=True).split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    rows: list[dict[str, Any]] = []
    for number, line in numbered:
        row = _parse_row(line)
        if row is not None:
            rows.append(row)
        elif number == numbered[-1][0]:
            logger.warning("%s: line %d is torn; leaving it out", path, number)
        else:
            raise error(
                f"{path}: line {number} is not a JSON object: {line[:60]!r}; mend the line or remove it"
            )
    return rows


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _end_last_line(file: Any) -> None:
    """Make a file opened with "a+b" end with a newline: complete a whole last row, cut off a torn one."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    data = file.read()
    start = data.rfind(b"\n") + 1
    if _parse_row(data[start:].decode("utf-8", errors="replace")) is None:
        file.truncate(start)
    else:
        file.write(b"\n")


def _read_text(path: Path, error: type[UserError], *, torn_end: bool = False) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as problem:
        raise error(f"{path}: there is no such file") from problem
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    try:
        # A line torn inside a character is a torn line, not a wrongly encoded file.
        return data.decode("utf-8", errors="replace" if torn_end else "strict")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not a UTF-8 text file ({problem.reason} at byte {problem.start})") from problem


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if "No space left on device" in str(error):  # safetensors, and torch's C++ writers
            return True
        error = error.__cause__ or error.__context__
    return False


def _free_mib(path: Path) -> int:
    """Free space where ``path`` would stand, in MiB."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free // _MIB
