"""Tensors of ``.pt`` and ``.pth`` files, which are zip archives of a pickled description and plain bytes.

:mod:`restricted_pickle` reads the description; reading a tensor maps its bytes. Layout of the archive:
https://docs.pytorch.org/docs/stable/notes/serialization.html. The format of torch before 1.6 is refused.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from megatron_flashi2v.checkpoint.arrangements import Box
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.restricted_pickle import MAX_BYTES, Name, Record, load_restricted
from megatron_flashi2v.conversion.sources import SourceTensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TENSOR = "_rebuild_tensor_v2"
_PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_ALLOWED: tuple[Name, ...] = (
    *(("torch", name) for name in (*_STORAGES, "Size", "float32", "float16", "bfloat16")),
    *(("torch._utils", name) for name in (_TENSOR, *_PARAMETERS)),
    # What trainers keep beside the weights: the arguments of the run and the state of its random numbers.
    ("argparse", "Namespace"),
    ("torch", "device"),
    ("_codecs", "encode"),
    *((module, name) for module, name in itertools.product(
        ("numpy.core.multiarray", "numpy._core.multiarray"), ("_reconstruct", "scalar")
    )),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
)
_PACKAGES = ("megatron", "mindspeed", "mindspeed_mm")
"""Trainers whose enumerations and records stand among the arguments."""
_MAX_DEPTH = 16


@dataclass(frozen=True)
class _Storage:
    """Place of a storage's bytes in the file."""

    begin: int
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class ArchivedTensor(SourceTensor):
    """A tensor of an archive: a strided view of a storage that other tensors may share.

    Attributes:
        begin: position of the storage's first byte in the file.
        nbytes: bytes of the storage.
        offset: the tensor's first value in the storage.
        stride: in values, one for each dimension.
    """

    begin: int
    nbytes: int
    offset: int
    stride: tuple[int, ...]

    def read(self, box: Box | None = None) -> torch.Tensor:
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)[box or ()]
        try:
            content = np.memmap(self.path, mode="r", dtype=np.uint8, offset=self.begin, shape=(self.nbytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: tensor {self.name} cannot be read: {error}") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only memory, which we only read
            values = torch.from_numpy(content)
        values = values[: self.nbytes // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        # A copy, so that the map is released on return.
        return values.as_strided(self.shape, self.stride, self.offset)[box or ()].clone(
            memory_format=torch.contiguous_format
        )


def is_torch_archive(path: Path) -> bool:
    """Whether a file's name ends as torch's files do."""
    return path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".ema")


def open_torch_archive(path: Path) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """Open all tensors of a file; also returns the names of its other entries.

    Joins the names of nested dictionaries by dots.

    Raises:
        CheckpointError: the file is no archive, is cut short, or its pickle needs more than tensors in dictionaries.
    """
    try:
        with open(path, "rb") as file:
            return read_archive(file, path, 0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def read_archive(file: IO[bytes], path: Path, base: int) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """As :func:`open_torch_archive`, for an archive at byte ``base`` of ``path``; ``file`` begins there."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole torch archive ({error}): it is cut short, or a bare pickle or a file of torch "
            "before 1.6, neither of which can be read; save its tensors anew, best as safetensors"
        ) from error
    with archive:
        tree = _describe(archive, file, path, base)
    tensors: dict[str, SourceTensor] = {}
    others: list[str] = []
    for name, value in _leaves(tree, "", path, 0):
        tensor = _tensor(name, value, path)
        if tensor is None:
            others.append(name)
        else:
            tensors[name] = tensor
    return tensors, tuple(others)


def _describe(archive: zipfile.ZipFile, file: IO[bytes], path: Path, base: int) -> Any:
    """Load the archive's pickle, with the place of each storage."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    descriptions = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(descriptions) != 1:
        raise CheckpointError(f"{path} is a zip archive without a data.pkl; it was not written by torch.save")
    prefix = descriptions[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine, which is not supported")
    if entries[descriptions[0]].file_size > MAX_BYTES:
        raise CheckpointError(f"{path}: its data.pkl has more than {MAX_BYTES:,} bytes")

    def storage(identifier: Any) -> _Storage:
        try:
            kind, storage_type, key, _, count = identifier
            dtype = _STORAGES[storage_type.__name__]
            entry = entries[f"{prefix}data/{key}"]
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{path}: its data.pkl refers to a missing storage") from error
        if kind != "storage" or entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: storage {key} is compressed or of an unknown kind")
        if not isinstance(count, int) or count * dtype.itemsize != entry.file_size:
            raise CheckpointError(f"{path}: storage {key} has {entry.file_size:,} bytes; data.pkl says another size")
        return _Storage(base + _data_offset(file, entry, path), entry.file_size, dtype)

    return load_restricted(
        archive.read(descriptions[0]), _ALLOWED, source=path, packages=_PACKAGES, persistent=storage
    )


def _data_offset(file: IO[bytes], entry: zipfile.ZipInfo, path: Path) -> int:
    """Position of an entry's bytes: after its local header, by the two lengths in that header."""
    place = file.tell()
    file.seek(entry.header_offset)
    header = file.read(30)
    file.seek(place)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{path}: the archive's entry {entry.filename} is damaged")
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _leaves(value: Any, name: str, path: Path, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{path}: {name[:80]} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key), path, depth + 1)
    else:
        yield name, value


def _tensor(name: str, value: Any, path: Path) -> ArchivedTensor | None:
    """The tensor that a record describes; None for any other value."""
    while isinstance(value, Record) and value.name in _PARAMETERS and value.arguments:
        value = value.arguments[0]
    if not (isinstance(value, Record) and value.name == _TENSOR):
        return None
    storage, offset, size, stride, *_ = (*value.arguments, None, None, None, None)
    size, stride = _integers(size), _integers(stride)
    if (
        not isinstance(storage, _Storage) or type(offset) is not int or offset < 0
        or size is None or stride is None or len(size) != len(stride)
    ):  # fmt: skip
        raise CheckpointError(f"{path}: tensor {name} is described in a way that is not supported")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if math.prod(size) and (last + 1) * storage.dtype.itemsize > storage.nbytes:
        raise CheckpointError(f"{path}: tensor {name} of shape {size} reaches past the end of its storage")
    return ArchivedTensor(
        path=path, name=name, shape=size, dtype=storage.dtype, begin=storage.begin, nbytes=storage.nbytes,
        offset=offset, stride=stride,
    )


def _integers(values: Any) -> tuple[int, ...] | None:
    if isinstance(values, Record) and values.name == "Size" and values.arguments:
        values = values.arguments[0]
    if not isinstance(values, (tuple, list)) or any(type(value) is not int or value < 0 for value in values):
        return None
    return tuple(values)


class Window(io.RawIOBase):
    """A stretch of a file as a file: an archive inside a larger file."""

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._place = file, begin, length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Position in the stretch."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, but never before the stretch's first byte."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise ValueError("the position lies before the beginning")
        self._place = origin + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Read at most ``size`` bytes, and none past the stretch's end."""
        left = max(0, self._length - self._place)
        self._file.seek(self._begin + self._place)
        data = self._file.read(left if size < 0 else min(size, left))
        self._place += len(data)
        return data
