"""``manifest.json`` of a checkpoint: size and SHA-256 of all its files, and of itself.

Detects any changed byte of the folder: in a file by its hash, in the manifest because its text must be, to the last
character, the one that its content and hash give.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_flashi2v.checkpoint.index import INDEX_NAME, plain_file_name, read_index
from megatron_flashi2v.checkpoint.tensor_file import FileRecord, sha256_of
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.runtime.files import atomic_write_text

MANIFEST_NAME = "manifest.json"
_FORMAT_VERSION = 1
# Hashing releases Python's lock, and one thread does not keep a disk busy.
_THREADS = 4


def write_manifest(folder: Path, documents: Iterable[str]) -> None:
    """Write the manifest of a folder whose ``index.json`` is written.

    Args:
        folder: a checkpoint.
        documents: names of its other files; tensor files are in the index.
    """
    files = dict(read_index(folder).files)
    for name in (INDEX_NAME, *documents):
        path = folder / name
        files[name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
    atomic_write_text(folder / MANIFEST_NAME, _text(files))


def _text(files: Mapping[str, FileRecord]) -> str:
    """The only text of a manifest of these files; its last line hashes the lines before."""
    records = {name: {"bytes": files[name].bytes, "sha256": files[name].sha256} for name in sorted(files)}
    body = f'{{\n"format_version": {_FORMAT_VERSION},\n"files": {json.dumps(records, indent=1)},\n'
    return f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Read the records of the files that make up a checkpoint.

    Raises:
        CheckpointError: the manifest is missing, from another version, or was altered.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        document = json.loads(text)
        version = document["format_version"]
        files = {
            plain_file_name(name): FileRecord(bytes=int(record["bytes"]), sha256=str(record["sha256"]))
            for name, record in document["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if text != _text(files):
        raise CheckpointError(
            f"{path} is damaged, or of another version ({version!r}; this one is {_FORMAT_VERSION})"
        )
    return files


def verify(
    folder: Path, *, part: int = 0, parts: int = 1, needs: Callable[[str], bool] = lambda key: True
) -> None:
    """Compare a checkpoint's files with its manifest.

    Always reads the small files. Reads only this caller's part of the tensor files, and only those that hold a needed
    tensor.

    Args:
        folder: a checkpoint.
        part: number of this caller.
        parts: callers that share the tensor files.
        needs: whether the caller will read a tensor, by its key.

    Raises:
        CheckpointError: names the first file that is missing, truncated or altered.
    """
    files = read_manifest(folder)
    if INDEX_NAME not in files:
        raise CheckpointError(f"{folder / MANIFEST_NAME} does not name {INDEX_NAME}; the checkpoint is not whole")
    _require_record(folder / INDEX_NAME, files[INDEX_NAME])
    index = read_index(folder)
    needed = {
        piece.file for key, tensor in index.tensors.items() if needs(key) for piece in tensor.pieces
    }
    unknown = sorted(index.files.keys() - files.keys())
    if unknown:
        raise CheckpointError(f"{folder / MANIFEST_NAME} does not name {unknown[0]}; the checkpoint is not whole")
    documents = sorted(files.keys() - index.files.keys() - {INDEX_NAME})
    # The largest first, so that the parts have about one size.
    tensors = sorted(needed, key=lambda name: (-files[name].bytes, name))[part::parts]
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for _ in pool.map(lambda name: _require_record(folder / name, files[name]), [*documents, *tensors]):
            pass


def _require_record(path: Path, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
        digest = sha256_of(path) if size == record.bytes else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if digest is None:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes, {MANIFEST_NAME} says {record.bytes}")
    if digest != record.sha256:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs from {MANIFEST_NAME}'s")
