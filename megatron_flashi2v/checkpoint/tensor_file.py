"""One safetensors file: written tensor by tensor and hashed on the way, read by memory map.

The library's own writer takes every tensor in host memory at once and would need a second pass for the hash.
The format is an 8-byte little-endian header length, a JSON header and the tensors' bytes back to back
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.runtime.files import full_disk_named

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_HASH_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and hash of a file, to detect a truncated or altered one."""

    bytes: int
    sha256: str


def write_tensor_file(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[torch.Tensor],
    *,
    on_bytes: Callable[[int], None] | None = None,
    hashed: bool = True,
) -> FileRecord:
    """Write ``tensors`` (in the order of ``specs``, on any device) to ``path`` and flush it to the disk.

    Keeps one tensor in host memory at a time, so ``tensors`` may be a generator. The file is visible under ``path``
    while it grows: publish it by renaming its folder.

    Args:
        path: the file.
        specs: name, dtype and shape of each tensor.
        tensors: the values.
        on_bytes: called with the number of bytes after each tensor.
        hashed: compute the hash; without it the record's hash is empty.

    Raises:
        UserError: the disk is full.
        OSError: the path cannot be written.
        CheckpointError: a tensor differs from its spec, or the dtype cannot be stored.
    """
    header = _header(path, specs)
    digest = hashlib.sha256()
    size = 0
    with full_disk_named(path), open(path, "wb") as file:
        for block in (len(header).to_bytes(8, "little"), header):
            file.write(block)
            digest.update(block)
            size += len(block)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise CheckpointError(
                    f"{path}: tensor {spec.name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"announced as {spec.dtype} {spec.shape}"
                )
            values = tensor.detach().to("cpu").contiguous()
            # A flat view of bytes serves every dtype, also bfloat16, which numpy lacks; as_strided because a
            # single value may count as contiguous under any stride.
            content = values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data
            file.write(content)
            if hashed:
                digest.update(content)
            size += content.nbytes
            if on_bytes is not None:
                on_bytes(content.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(bytes=size, sha256=digest.hexdigest() if hashed else "")


def _header(path: Path, specs: Sequence[TensorSpec]) -> bytes:
    # "format: pt" is what transformers and diffusers look for before they load a file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for spec in specs:
        if spec.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{path}: tensor {spec.name} has dtype {spec.dtype}, which cannot be stored"
            )
        if spec.name in header:
            raise CheckpointError(f"{path}: tensor {spec.name} is given twice")
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begin += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the values begin at a multiple of 8 bytes


@contextmanager
def open_tensor_file(path: Path, expected_bytes: int | None = None) -> Iterator[Any]:
    """A memory-mapped ``safetensors.safe_open`` handle, which reads tensors on demand.

    Raises:
        CheckpointError: the file is missing, damaged, or not as long as ``expected_bytes``.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if expected_bytes is not None and size != expected_bytes:
        raise CheckpointError(
            f"{path} is {size} bytes long, its index says {expected_bytes}; the file is damaged, use another copy"
        )
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    with handle:
        yield handle


def read_tensor(path: Path, handle: Any, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
    """Read tensor ``name``, or only ``part`` of it, of a file opened with :func:`open_tensor_file`.

    Raises:
        CheckpointError: the file does not hold the tensor.
    """
    try:
        # An empty part is a scalar's, which the library cannot slice. A whole tensor stays a view of the map, uncopied.
        if not part or [(side.start or 0, side.stop) for side in part] == [
            (0, size) for size in handle.get_slice(name).get_shape()
        ]:
            return handle.get_tensor(name)
        return handle.get_slice(name)[part]
    except (SafetensorError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
