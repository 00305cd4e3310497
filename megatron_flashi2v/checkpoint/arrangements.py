"""Arrangements: how external tensors hold the values of one of ours, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Size = int | str | tuple[int, str]  # a number, a symbol, or a multiple of a symbol
Sizes = tuple[Size, ...]
Shape = tuple[int, ...]
Box = tuple[slice, ...]
"""Half-open ranges, one for each of a tensor's dimensions."""
ReadBox = Callable[[str, Box], torch.Tensor]
"""Reads a box of an external tensor, given its name."""


@dataclass(frozen=True)
class Same:
    """One external tensor with our shape."""

    def to_external(self, tensor: torch.Tensor, shape: Shape, heads: int) -> tuple[torch.Tensor, ...]:
        """The external tensors, each of ``shape``."""
        return (tensor,)

    def to_ours(self, tensors: Sequence[torch.Tensor], shape: Shape, heads: int) -> torch.Tensor:
        """Our tensor, of ``shape``."""
        return tensors[0]

    def read_box(
        self, read: ReadBox, names: Sequence[str], box: Box, shape: Shape, external: Shape, heads: int
    ) -> torch.Tensor:
        """``box`` of our tensor of ``shape``; reads hardly more of the external tensors than it needs."""
        return read(names[0], box)


@dataclass(frozen=True)
class Reshape:
    """One external tensor with the same values in the same order, in another shape."""

    external: Sizes

    def to_external(self, tensor: torch.Tensor, shape: Shape, heads: int) -> tuple[torch.Tensor, ...]:
        """The external tensors, each of ``shape``."""
        return (tensor.reshape(shape),)

    def to_ours(self, tensors: Sequence[torch.Tensor], shape: Shape, heads: int) -> torch.Tensor:
        """Our tensor, of ``shape``."""
        return tensors[0].reshape(shape)

    def read_box(
        self, read: ReadBox, names: Sequence[str], box: Box, shape: Shape, external: Shape, heads: int
    ) -> torch.Tensor:
        """As :meth:`Same.read_box`; reads only the box's rows if the external tensor has the same rows."""
        columns = tuple(slice(0, size) for size in external[1:])
        if shape[0] != external[0]:
            return read(names[0], (slice(0, external[0]), *columns)).reshape(shape)[box]
        rows = read(names[0], (box[0], *columns))
        inner = (slice(None), *box[1:])
        return rows.reshape(len(rows), *shape[1:])[inner]


@dataclass(frozen=True)
class FusedHeads:
    """Several external projections that are one tensor of ours, fused head by head.

    Our rows are ordered (head, part, channel), so that a contiguous slice of rows is a set of heads with all
    their parts; every external tensor has rows (head, channel).
    """

    parts: tuple[str, ...]

    def to_external(self, tensor: torch.Tensor, shape: Shape, heads: int) -> tuple[torch.Tensor, ...]:
        """The external tensors, each of ``shape``."""
        by_head = tensor.reshape(heads, len(self.parts), -1, *shape[1:])
        return tuple(part.reshape(shape) for part in by_head.unbind(1))

    def to_ours(self, tensors: Sequence[torch.Tensor], shape: Shape, heads: int) -> torch.Tensor:
        """Our tensor, of ``shape``."""
        by_head = [part.reshape(heads, -1, *shape[1:]) for part in tensors]
        return torch.stack(by_head, dim=1).reshape(shape)

    def read_box(
        self, read: ReadBox, names: Sequence[str], box: Box, shape: Shape, external: Shape, heads: int
    ) -> torch.Tensor:
        """As :meth:`Same.read_box`; reads only the heads that the box touches."""
        rows, part_rows = shape[0] // heads, external[0] // heads
        first, last = box[0].start // rows, -(-box[0].stop // rows)
        parts = [read(name, (slice(first * part_rows, last * part_rows), *box[1:])) for name in names]
        whole_heads = self.to_ours(parts, ((last - first) * rows, *parts[0].shape[1:]), last - first)
        return whole_heads[box[0].start - first * rows : box[0].stop - first * rows]


Transform = Same | Reshape | FusedHeads
