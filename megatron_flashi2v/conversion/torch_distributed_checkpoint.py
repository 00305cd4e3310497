"""Tensors of a folder that ``torch.distributed.checkpoint`` (DCP) wrote, such as an FSDP run's.

:mod:`restricted_pickle` reads ``.metadata``, a pickle, and makes inert records of DCP's metadata classes. They say
which stretch of which ``.distcp`` file holds each chunk of each tensor; a chunk is a torch archive of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.arrangements import Box
from megatron_flashi2v.checkpoint.regions import Region, coverage_fault, intersection
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.restricted_pickle import Name, Record, load_restricted
from megatron_flashi2v.conversion.sources import SourceTensor, box_shape, whole_box
from megatron_flashi2v.conversion.torch_archive import Window, read_archive

METADATA_NAME = ".metadata"

_PACKAGE = "torch.distributed.checkpoint"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip
_ALLOWED: tuple[Name, ...] = (
    *((f"{_PACKAGE}.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    )),
    # The plans of a save, which megatron-core keeps for the next one.
    *((f"{_PACKAGE}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *((f"{_PACKAGE}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in _DTYPES),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
)  # fmt: skip


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor and the stretch of a file that holds it."""

    region: Region
    path: Path
    begin: int
    length: int


@dataclass(frozen=True, kw_only=True)
class DistributedTensor(SourceTensor):
    """A tensor in chunks."""

    chunks: tuple[_Chunk, ...]

    def read(self, box: Box | None = None) -> torch.Tensor:
        box = box or whole_box(self.shape)
        wanted = Region(tuple(side.start for side in box), box_shape(box), None)
        result = torch.empty(wanted.shape, dtype=self.dtype)
        for chunk in self.chunks:
            shared = intersection(chunk.region, wanted)
            if shared is None:
                continue
            offset, shape = shared
            source = _within(offset, shape, chunk.region)
            result[_within(offset, shape, wanted)] = self._open(chunk).read(source)
        return result

    def _open(self, chunk: _Chunk) -> SourceTensor:
        try:
            with open(chunk.path, "rb") as file:
                if chunk.begin + chunk.length > chunk.path.stat().st_size:
                    raise CheckpointError(f"{chunk.path} is cut short: tensor {self.name} reaches past its end")
                # zipfile takes a read-only stretch, though its annotations do not.
                window: Any = Window(file, chunk.begin, chunk.length)
                tensors, _ = read_archive(window, chunk.path, chunk.begin)
        except OSError as error:
            raise CheckpointError(f"{chunk.path} cannot be read: {error.strerror or error}") from error
        tensor = tensors.get("")  # the archive holds the tensor itself, not a dictionary
        if tensor is None or tensor.shape != chunk.region.shape or tensor.dtype != self.dtype:
            raise CheckpointError(f"{chunk.path}: the chunk of tensor {self.name} contradicts {METADATA_NAME}")
        return tensor


def _within(offset: tuple[int, ...], shape: tuple[int, ...], region: Region) -> Box:
    return tuple(
        slice(start - zero, start - zero + size)
        for start, zero, size in zip(offset, region.offset, shape, strict=True)
    )


def open_distributed(folder: Path) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """Open all tensors of a folder; also returns the names of its other entries.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, or needs other classes; a chunk's file is missing or its
            name leads out of the folder; chunks leave a hole or overlap.
    """
    path = folder / METADATA_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    metadata = load_restricted(data, _ALLOWED, source=path)
    described = metadata.field("state_dict_metadata") if isinstance(metadata, Record) else None
    stored = metadata.field("storage_data") if isinstance(metadata, Record) else None
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds no metadata of torch.distributed.checkpoint")
    places = {_place(key, path): value for key, value in stored.items()}
    tensors: dict[str, SourceTensor] = {}
    others: list[str] = []
    for name, entry in described.items():
        if isinstance(entry, Record) and entry.name == "TensorStorageMetadata":
            tensors[name] = _tensor(folder, str(name), entry, places)
        else:
            others.append(str(name))
    return tensors, tuple(others)


def _place(key: Any, path: Path) -> tuple[Any, tuple[int, ...]]:
    if not isinstance(key, Record) or key.name != "MetadataIndex":
        raise CheckpointError(f"{path}: its storage_data has an unknown form")
    return key.field("fqn"), _sizes(key.field("offset") or (), path)


def _tensor(
    folder: Path, name: str, entry: Record, places: Mapping[tuple[Any, tuple[int, ...]], Any]
) -> DistributedTensor:
    path = folder / METADATA_NAME
    properties, chunks = entry.field("properties"), entry.field("chunks")
    state = properties.state if isinstance(properties, Record) else None
    dtype = _DTYPES.get(getattr(state[0], "__name__", "")) if isinstance(state, tuple) and state else None
    if dtype is None or not isinstance(chunks, list) or not all(isinstance(chunk, Record) for chunk in chunks):
        raise CheckpointError(f"{path}: tensor {name} is described in a way that is not supported")
    shape = _sizes(entry.field("size"), path)
    parts = []
    for chunk in chunks:
        offset = _sizes(chunk.field("offsets"), path)
        region = Region(offset, _sizes(chunk.field("sizes"), path), None)
        parts.append(_chunk(folder, name, region, places.get((name, offset))))
    if any(len(part.region.offset) != len(shape) or len(part.region.shape) != len(shape) for part in parts):
        raise CheckpointError(f"{path}: chunks of tensor {name} have other dimensions than {shape}")
    fault = coverage_fault(shape, [part.region for part in parts]) if math.prod(shape) else None
    if fault is not None:
        raise CheckpointError(f"{path}: tensor {name} of shape {shape} is not stored exactly once: {fault}")
    return DistributedTensor(path=path, name=name, shape=shape, dtype=dtype, chunks=tuple(parts))


def _chunk(folder: Path, name: str, region: Region, info: Any) -> _Chunk:
    path = folder / METADATA_NAME
    file, begin, length = (
        (info.field("relative_path"), info.field("offset"), info.field("length"))
        if isinstance(info, Record)
        else (None, None, None)
    )
    if not isinstance(file, str) or type(begin) is not int or type(length) is not int or min(begin, length) < 0:
        raise CheckpointError(f"{path} does not say where a chunk of tensor {name} lies")
    if Path(file).name != file:
        raise CheckpointError(f"{path} says that tensor {name} is in {file!r}, which is not a plain file name")
    if info.field("transform_descriptors"):
        raise CheckpointError(f"{path}: tensor {name} is compressed or encrypted, which is not supported")
    if not (folder / file).is_file():
        raise CheckpointError(f"{path} says that tensor {name} is in {file}, but there is no such file")
    return _Chunk(region, folder / file, begin, length)


def _sizes(value: Any, path: Path) -> tuple[int, ...]:
    if isinstance(value, Record) and value.name == "Size" and value.arguments:
        value = value.arguments[0]
    if not isinstance(value, (tuple, list)) or any(type(size) is not int or size < 0 for size in value):
        raise CheckpointError(f"{path}: a shape or an offset has an unknown form")
    return tuple(value)
