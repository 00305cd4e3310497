"""``index.json`` of a sharded checkpoint: which file holds which part of which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.regions import Region, piece_regions
from megatron_flashi2v.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, FileRecord
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.runtime.files import atomic_write_text, read_json_object

INDEX_NAME = "index.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StoredPiece:
    """A part of a global tensor in a file: a box, or a half-open stretch of the flattened box."""

    file: str
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    flat_range: tuple[int, int] | None

    @property
    def regions(self) -> tuple[Region, ...]:
        """The boxes of the global tensor that it holds."""
        return piece_regions(self.offset, self.shape, self.flat_range)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A global tensor and all its parts, which cover it exactly once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """All tensors of a folder by key, and all files by name."""

    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, FileRecord]


def write_index(folder: Path, index: Index) -> None:
    """Write ``index.json``; :func:`read_index` reads it."""
    atomic_write_text(folder / INDEX_NAME, index_text(index))


def index_text(index: Index) -> str:
    """The text of an ``index.json``, one line per tensor; :func:`parse_index` reads it."""
    files = {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in index.files.items()}
    tensors = [
        f"{json.dumps(key)}: {json.dumps(_tensor_json(tensor))}" for key, tensor in index.tensors.items()
    ]
    lines = [
        "{",
        f'"format_version": {FORMAT_VERSION},',
        f'"files": {json.dumps(files)},',
        '"tensors": {',
        ",\n".join(tensors),
        "}}",
    ]
    return "\n".join(lines) + "\n"


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    pieces = [
        {
            "file": piece.file,
            "name": piece.name,
            "offset": piece.offset,
            "shape": piece.shape,
            "flat_range": piece.flat_range,
        }
        for piece in tensor.pieces
    ]
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "pieces": pieces}


def read_index(folder: Path) -> Index:
    """Read the index of a folder.

    Raises:
        CheckpointError: it is missing, malformed, from another version, or names files outside the folder.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; {folder} is not a whole checkpoint")
    return _from_document(read_json_object(path, error=CheckpointError), path)


def parse_index(text: str, source: Path) -> Index:
    """Read the text that :func:`index_text` made.

    Args:
        text: JSON.
        source: name of the text in errors.

    Raises:
        CheckpointError: as :func:`read_index`.
    """
    return _from_document(json.loads(text), source)


def _from_document(document: dict[str, Any], path: Path) -> Index:
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}")
    try:
        files = {
            plain_file_name(name): FileRecord(bytes=int(record["bytes"]), sha256=str(record["sha256"]))
            for name, record in document["files"].items()
        }
        tensors = {key: _stored_tensor(value, files) for key, value in document["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed ({type(error).__name__}: {error})") from error
    return Index(tensors=tensors, files=files)


def plain_file_name(name: str) -> str:
    """Return ``name`` if it names a file of the same folder; an index may come from anyone.

    Raises:
        ValueError: it leads out of the folder, or is hidden.
    """
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"file name {name!r} is not a plain name")
    return name


def _stored_tensor(value: Any, files: Mapping[str, FileRecord]) -> StoredTensor:
    pieces = []
    for piece in value["pieces"]:
        if piece["file"] not in files:
            raise ValueError(f"file {piece['file']!r} is not among the index's files")
        flat_range = piece["flat_range"]
        pieces.append(
            StoredPiece(
                file=piece["file"],
                name=str(piece["name"]),
                offset=_integers(piece["offset"]),
                shape=_integers(piece["shape"]),
                flat_range=None if flat_range is None else (int(flat_range[0]), int(flat_range[1])),
            )
        )
    return StoredTensor(dtype=DTYPES[value["dtype"]], shape=_integers(value["shape"]), pieces=tuple(pieces))


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
