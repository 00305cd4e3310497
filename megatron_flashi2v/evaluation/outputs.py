"""The files of an evaluation: their names, their owner, and which of them compare."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.runtime.files import read_json

EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"
KIND = "flashi2v evaluation"
GENERATOR = f'<meta name="generator" content="{KIND}">'
"""Marks every report, so that a later run recognises it."""


def require_own(folder: Path) -> None:
    """Refuse an output folder that cannot be written, or that holds files which are not an evaluation's.

    Raises:
        ConfigError: names the file.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output {folder}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {folder}: {existing} may not be written; choose another folder")
    path = folder / EVALUATION_FILE
    if path.exists() and not _is_ours(path):
        raise ConfigError(f"{path}: exists and is no evaluation; move it, or choose another --output")
    path = folder / REPORT_FILE
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{path}: exists and is no evaluation's report; move it, or choose another --output")


def read_evaluation(path: Path) -> dict[str, Any]:
    """An earlier ``evaluation.json``.

    Args:
        path: the file, or its folder.

    Raises:
        DataError: it is missing, damaged, or something else.
    """
    if path.is_dir():
        path = path / EVALUATION_FILE
    value = read_json(path, error=DataError)
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise DataError(f"{path}: is no evaluation; give the evaluation.json of `flashi2v evaluate`")
    return value


def require_same_settings(settings: Mapping[str, Any], other: Mapping[str, Any], path: Path) -> None:
    """Refuse to put figures of different settings side by side.

    Args:
        settings: of one evaluation.
        other: of the other one.
        path: of the other one, for the error.

    Raises:
        ConfigError: lists what differs.
    """
    differing = list(_differences("", settings, other))
    if differing:
        raise ConfigError(
            f"{path}: was evaluated with other settings and is not comparable: {'; '.join(differing)}. Evaluate it "
            "again with the same ones"
        )


def _is_ours(path: Path) -> bool:
    try:
        read_evaluation(path)
    except DataError:
        return False
    return True


def _differences(prefix: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in sorted(one.keys() | other.keys()):
            yield from _differences(f"{prefix}.{name}" if prefix else name, one.get(name), other.get(name))
    elif one != other:
        yield f"{prefix} is {one} here and {other} there"
