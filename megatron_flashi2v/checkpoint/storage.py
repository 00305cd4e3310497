"""Sharded tensors on disk, without pickle: every rank writes what it holds, any layout reads what it needs.

A folder holds one safetensors file per writing rank and ``index.json``, which says where every part of every
global tensor lies. Parts are boxes of the global tensor, or stretches of a box's row-major order (the distributed
optimizer's shards), so that reading at another layout copies intersections of boxes.

Not megatron-core's dist_checkpointing: it pickles its common state and its index, and its optimizer format that loads
at another layout gathers the whole fp32 state on every data-parallel rank's host before it writes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.index import (
    INDEX_NAME,
    Index,
    StoredPiece,
    StoredTensor,
    read_index,
)
from megatron_flashi2v.checkpoint.regions import (
    Region,
    coverage_fault,
    intersection,
    piece_regions,
)
from megatron_flashi2v.checkpoint.tensor_file import (
    DTYPE_NAMES,
    FileRecord,
    TensorSpec,
    open_tensor_file,
    read_tensor,
    write_tensor_file,
)
from megatron_flashi2v.config.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class TensorPiece:
    """The part of one global tensor that this rank holds, and the memory that holds it.

    Attributes:
        key: name of the global tensor in the checkpoint, such as ``model.head.linear.weight``.
        global_shape: shape of the whole tensor.
        offset: where this rank's box begins in it.
        shape: extent of the box.
        flat_range: half-open stretch of the row-major flattened box that this rank holds; None is the whole
            box.
        data: the values, box-shaped, or 1-D under ``flat_range``; reading fills it in place.
        owner: whether this rank writes it; exactly one of the replicas does.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    flat_range: tuple[int, int] | None = None
    data: torch.Tensor
    owner: bool = True

    def __post_init__(self) -> None:
        if self.flat_range is None:
            expected = self.shape
        else:
            begin, end = self.flat_range
            if not 0 <= begin <= end <= math.prod(self.shape):
                raise ValueError(
                    f"{self.key}: stretch {self.flat_range} does not lie within the box {self.shape}"
                )
            expected = (end - begin,)
        if tuple(self.data.shape) != expected:
            raise ValueError(f"{self.key}: data has shape {tuple(self.data.shape)}, the part {expected}")

    @classmethod
    def whole(cls, key: str, data: torch.Tensor) -> TensorPiece:
        """A piece that holds all of a tensor."""
        shape = tuple(data.shape)
        return cls(key=key, global_shape=shape, offset=(0,) * len(shape), shape=shape, data=data)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The boxes of the global tensor that ``data`` holds."""
        return piece_regions(self.offset, self.shape, self.flat_range)

    @property
    def is_whole(self) -> bool:
        """Whether ``data`` is all of the global tensor, in its shape."""
        return self.shape == self.global_shape and self.flat_range is None

    def view(self, region: Region) -> torch.Tensor:
        """The part of ``data`` that holds ``region``, in the region's shape, sharing memory."""
        if region.start is None:
            return self.data
        return self.data[region.start : region.start + math.prod(region.shape)].view(region.shape)


def tensor_file_name(number: int, total: int) -> str:
    """Name of the file that holds one rank's tensors."""
    return f"tensors-{number:05d}-of-{total:05d}.safetensors"


def write_rank_file(
    folder: Path,
    pieces: Iterable[TensorPiece],
    *,
    rank: int,
    world_size: int,
    on_bytes: Callable[[int], None] | None = None,
) -> Index:
    """Write one rank's owned pieces into the existing ``folder``, without communication.

    Args:
        folder: existing.
        pieces: this rank's parts of tensors; it writes those that it owns, and no file if it owns none.
        rank: its number.
        world_size: ranks that write.
        on_bytes: called with the number of bytes after each tensor.

    Returns:
        This rank's part of the index; :func:`merge_parts` joins the parts of all ranks.

    Raises:
        UserError: the disk is full, or the file cannot be written.
        CheckpointError: a piece has a dtype that cannot be stored.
    """
    owned = [piece for piece in pieces if piece.owner and piece.data.numel()]
    if not owned:
        return Index(tensors={}, files={})
    file_name = tensor_file_name(rank, world_size)
    stored: defaultdict[str, list[StoredPiece]] = defaultdict(list)
    specs: list[TensorSpec] = []
    for piece in owned:
        # A part's name is unique in the folder: other readers take tensors of one name in two files for one.
        count = len(stored[piece.key])
        name = piece.key if piece.is_whole and not count else f"{piece.key}#{rank}.{count}"
        specs.append(TensorSpec(name=name, dtype=piece.data.dtype, shape=tuple(piece.data.shape)))
        stored[piece.key].append(
            StoredPiece(
                file=file_name, name=name, offset=piece.offset, shape=piece.shape, flat_range=piece.flat_range
            )
        )
    record = write_tensor_file(folder / file_name, specs, (piece.data for piece in owned), on_bytes=on_bytes)
    first = {piece.key: piece for piece in reversed(owned)}
    for piece in owned:
        _require_same(
            piece.key,
            (first[piece.key].data.dtype, first[piece.key].global_shape),
            (piece.data.dtype, piece.global_shape),
        )
    tensors = {
        key: StoredTensor(dtype=first[key].data.dtype, shape=first[key].global_shape, pieces=tuple(parts))
        for key, parts in stored.items()
    }
    return Index(tensors=tensors, files={file_name: record})


def merge_parts(parts: Sequence[Index]) -> Index:
    """Join the ranks' parts of an index.

    Raises:
        CheckpointError: ranks disagree on a tensor's dtype or shape, or its parts leave a hole or overlap.
    """
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, FileRecord] = {}
    for part in parts:
        files.update(part.files)
        for key, tensor in part.tensors.items():
            known = tensors.get(key)
            if known is None:
                tensors[key] = tensor
                continue
            _require_same(key, (known.dtype, known.shape), (tensor.dtype, tensor.shape))
            tensors[key] = StoredTensor(
                dtype=known.dtype, shape=known.shape, pieces=known.pieces + tensor.pieces
            )
    for key, tensor in tensors.items():
        regions = [region for piece in tensor.pieces for region in piece.regions]
        fault = coverage_fault(tensor.shape, regions)
        if fault is not None:
            raise CheckpointError(f"tensor {key} of shape {tensor.shape} is not stored exactly once: {fault}")
    return Index(tensors=dict(sorted(tensors.items())), files=dict(sorted(files.items())))


def _require_same(
    key: str, first: tuple[torch.dtype, tuple[int, ...]], second: tuple[torch.dtype, tuple[int, ...]]
) -> None:
    if first != second:
        raise CheckpointError(
            f"tensor {key} is {first[0]} {first[1]} in one part and {second[0]} {second[1]} in another"
        )


def keys(folder: Path) -> tuple[str, ...]:
    """Sorted names of a folder's tensors."""
    return tuple(read_index(folder).tensors)


def read_pieces(
    folder: Path,
    pieces: Iterable[TensorPiece],
    *,
    strict: bool = True,
    allow_cast: bool = False,
    index: Index | None = None,
) -> tuple[str, ...]:
    """Fill every piece's ``data`` in place from a folder written at any layout.

    Reads only overlapping values, by memory map, and without communication.

    Args:
        folder: of rank files and their index.
        pieces: parts to fill, whatever their ``owner``.
        strict: raise if a tensor is not stored; otherwise leave its data as it is and return its key.
        allow_cast: convert to the dtype of ``data``; otherwise a difference is an error.
        index: the folder's index, if the caller has read it.

    Returns:
        Keys that are not stored (none under ``strict``).

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is missing, or has another shape or dtype.
    """
    index = index or read_index(folder)
    tasks: defaultdict[str, list[_Copy]] = defaultdict(list)
    missing: list[str] = []
    for piece in pieces:
        stored = index.tensors.get(piece.key)
        if stored is None:
            if strict:
                raise CheckpointError(f"{folder / INDEX_NAME}: the checkpoint has no tensor {piece.key}")
            missing.append(piece.key)
            continue
        _check_stored(folder, piece, stored, allow_cast)
        for copy in _copies(folder, piece, stored):
            tasks[copy.source.file].append(copy)
    with torch.no_grad():
        for file_name, copies in sorted(tasks.items()):
            path = folder / file_name
            with open_tensor_file(path, index.files[file_name].bytes) as handle:
                for copy in copies:
                    copy.run(path, handle)
    return tuple(missing)


def _check_stored(folder: Path, piece: TensorPiece, stored: StoredTensor, allow_cast: bool) -> None:
    if stored.shape != piece.global_shape:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: tensor {piece.key} has shape {stored.shape} in the checkpoint, "
            f"but the model needs {piece.global_shape}; their sizes differ"
        )
    if stored.dtype != piece.data.dtype and not allow_cast:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: tensor {piece.key} is stored as {DTYPE_NAMES[stored.dtype]}, "
            f"but {piece.data.dtype} is needed"
        )


@dataclass(frozen=True)
class _Copy:
    """Copies one box from a file into a piece's memory."""

    source: StoredPiece
    source_region: Region
    target: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def run(self, path: Path, handle: object) -> None:
        begin = tuple(
            start - zero for start, zero in zip(self.offset, self.source_region.offset, strict=True)
        )
        box = tuple(slice(start, start + size) for start, size in zip(begin, self.shape, strict=True))
        if self.source_region.start is None:
            values = read_tensor(path, handle, self.source.name, box)
        else:
            # Whole rows of the region are one stretch of the file; the other dimensions are cut in memory.
            row_size = math.prod(self.source_region.shape[1:])
            rows = self.shape[0] if self.shape else 1
            first = self.source_region.start + (begin[0] * row_size if begin else 0)
            flat = read_tensor(path, handle, self.source.name, (slice(first, first + rows * row_size),))
            in_rows = (slice(None), *box[1:])
            values = flat.view(rows, *self.source_region.shape[1:])[in_rows]
        self.target.copy_(values.reshape(self.shape))


def _copies(folder: Path, piece: TensorPiece, stored: StoredTensor) -> Iterable[_Copy]:
    copied = 0
    for source in stored.pieces:
        for source_region in source.regions:
            for region in piece.regions:
                shared = intersection(source_region, region)
                if shared is None:
                    continue
                offset, shape = shared
                box = tuple(
                    slice(start - zero, start - zero + size)
                    for start, zero, size in zip(offset, region.offset, shape, strict=True)
                )
                copied += math.prod(shape)
                yield _Copy(source, source_region, piece.view(region).detach()[box], offset, shape)
    if copied != piece.data.numel():
        raise CheckpointError(
            f"{folder / INDEX_NAME}: the parts of tensor {piece.key} hold {copied} of the "
            f"{piece.data.numel()} values needed; the index is damaged"
        )
