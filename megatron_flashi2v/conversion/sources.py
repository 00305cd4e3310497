"""Tensors in foreign files: read one at a time, or a box of one, whatever the file format."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.arrangements import Box
from megatron_flashi2v.checkpoint.tensor_file import DTYPES, open_tensor_file, read_tensor
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.runtime.files import read_json_object

_INDEX_NAME = re.compile(r".+\.(safetensors|bin)\.index(\.\w+)?\.json")
# Eight-bit floats, which others store and we only read.
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class SourceTensor(ABC):
    """One tensor of a file.

    Attributes:
        path: the file, for errors.
        name: its name in the file.
        shape: of the whole tensor.
        dtype: of the values that :meth:`read` returns.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype in the file."""
        return self.dtype

    @abstractmethod
    def read(self, box: Box | None = None) -> torch.Tensor:
        """Read the values, or those in ``box``, to the host; reads no other bytes.

        Raises:
            CheckpointError: they cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class SafetensorsTensor(SourceTensor):
    """A tensor of a safetensors file.

    Every read maps the file anew: the resident part of a lasting map would grow to the file's size.
    """

    def read(self, box: Box | None = None) -> torch.Tensor:
        with open_tensor_file(self.path) as handle:
            return read_tensor(self.path, handle, self.name, box)


def open_safetensors(path: Path) -> dict[str, SourceTensor]:
    """Open all tensors of one safetensors file.

    Raises:
        CheckpointError: it is missing, cut short, or holds an unknown dtype.
    """
    tensors: dict[str, SourceTensor] = {}
    try:
        with open_tensor_file(path) as handle:
            for name in list(handle.keys()):
                part = handle.get_slice(name)
                kind = part.get_dtype()
                dtype = DTYPES.get(kind, _FLOAT8.get(kind))
                if dtype is None:
                    raise CheckpointError(f"{path}: tensor {name} has dtype {kind}, which is not supported")
                tensors[name] = SafetensorsTensor(path=path, name=name, shape=tuple(part.get_shape()), dtype=dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_first_cut_tensor(path)}") from error
    return tensors


def _first_cut_tensor(path: Path) -> str:
    """Message on the first tensor that ends past the end of an unreadable file; empty if there is none."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:
                return ""
            header = json.loads(file.read(length))
        begin, size = 8 + length, path.stat().st_size
        ends = {name: begin + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        cut = [name for name, end in ends.items() if end > size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ""
    if not cut:
        return ""
    first = min(cut, key=ends.__getitem__)
    return f"; tensor {first} ends at byte {ends[first]:,}, the file at {size:,}: use another copy"


def is_index(path: Path) -> bool:
    """Whether a file's name is that of an index of shards, as Hugging Face libraries write it."""
    return _INDEX_NAME.fullmatch(path.name) is not None


def open_sharded(
    index: Path, open_shard: Callable[[Path], Mapping[str, SourceTensor]] = open_safetensors
) -> dict[str, SourceTensor]:
    """Open all tensors of the shards that a Hugging Face index names.

    Args:
        index: the file.
        open_shard: opens one shard.

    Raises:
        CheckpointError: the index is malformed, leads out of its folder, names a missing shard, or contradicts one.
    """
    weight_map = read_json_object(index, error=CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    shards: dict[str, Mapping[str, SourceTensor]] = {}
    for tensor, name in weight_map.items():
        if name in shards:
            continue
        # An index may come from anyone: it must not lead the reader out of its folder.
        if Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"{index} says that tensor {tensor} is in {name!r}, which is not a plain file name")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} says that tensor {tensor} is in {name}, but there is no such file")
        shards[name] = open_shard(index.parent / name)
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise CheckpointError(f"{index} says that tensor {tensor} is in {name}, which does not hold it")
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that covers a whole tensor."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Extent of a box."""
    return tuple(side.stop - side.start for side in box)
