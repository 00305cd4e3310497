"""Copies of a rank's tensors in host memory, to write a checkpoint from while training goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.runtime.device import Device

BLOCK_BYTES = 1 << 28
"""Large, since pinning many small blocks takes long; a power of two, since torch rounds pinned blocks up to one."""

_ALIGNMENT = 64
_GIB = 1024**3


class HostCopies:
    """Host memory for copies of pieces: pinned if they are on an accelerator, reused by the next checkpoint.

    Args:
        device: holds the pieces.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._blocks: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(block.numel() for block in self._blocks)

    @torch.no_grad()
    def take(self, pieces: Iterable[TensorPiece]) -> list[TensorPiece]:
        """Copy the pieces that this rank writes; the copies are valid until the next call.

        Raises:
            UserError: host memory is too small.
        """
        owned = _owned(pieces)
        copies = []
        for piece, place in zip(owned, self._places(owned), strict=True):
            data = place[: piece.data.nbytes].view(piece.data.dtype).view(piece.data.shape)
            copies.append(dataclasses.replace(piece, data=data.copy_(piece.data, non_blocking=True)))
        self._device.synchronize()
        return copies

    def reserve(self, pieces: Iterable[TensorPiece]) -> None:
        """Allocate the memory for such pieces, which takes longer than copying; no other method may run meanwhile.

        Raises:
            UserError: host memory is too small.
        """
        self._places(_owned(pieces))

    def _places(self, owned: list[TensorPiece]) -> list[torch.Tensor]:
        """A stretch of a block for each piece, one after the other; allocates missing blocks."""
        sizes = [_padded(piece.data.nbytes) for piece in owned]
        places = []
        left, block, begin = sum(sizes), 0, 0
        for size in sizes:
            while block < len(self._blocks) and begin + size > self._blocks[block].numel():
                block, begin = block + 1, 0
            if block == len(self._blocks):
                self._blocks.append(self._new_block(max(size, min(left, BLOCK_BYTES))))
            places.append(self._blocks[block][begin : begin + size])
            begin += size
            left -= size
        return places

    def _new_block(self, size: int) -> torch.Tensor:
        try:
            block = torch.empty(size, dtype=torch.uint8).zero_()  # the system gives pages when they are first written
            return block if self._device.name == "cpu" else block.pin_memory()
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"--async-save needs {(self.nbytes + size) / _GIB:.1f} GiB of host memory for each rank's copies, and "
                f"allocating them failed ({error}); leave it out, or start fewer processes on a host"
            ) from error


def _owned(pieces: Iterable[TensorPiece]) -> list[TensorPiece]:
    return [piece for piece in pieces if piece.owner and piece.data.numel()]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
