"""Parts of a tensor: boxes, and stretches of their row-major order.

A rank holds either a whole box of the global tensor (a tensor-parallel slice) or, under the distributed
optimizer, one contiguous stretch of that box flattened. A stretch is itself a handful of boxes, so that any two layouts
can be compared and copied into each other box by box.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A box of the global tensor, and its values' place in the data of the piece that holds it.

    Attributes:
        offset: first index of the box in every dimension of the global tensor.
        shape: extent of the box.
        start: position of the box's first value in the piece's 1-D data; its values follow in row-major
            order. None where the piece's data has the box's shape itself.
    """

    offset: Shape
    shape: Shape
    start: int | None


def piece_regions(offset: Shape, shape: Shape, flat_range: tuple[int, int] | None) -> tuple[Region, ...]:
    """The boxes of one piece: its whole box, or those of its half-open stretch ``flat_range``.

    At most ``2 * len(shape) - 1`` of them: the rest of a first row, whole rows, the beginning of a last row,
    and so on inward.
    """
    if flat_range is None:
        return (Region(offset, shape, None),)
    begin, end = flat_range
    return tuple(_stretch(offset, shape, begin, end, 0)) if end > begin else ()


def _stretch(offset: Shape, shape: Shape, begin: int, end: int, start: int) -> Iterable[Region]:
    if len(shape) <= 1:
        yield Region((offset[0] + begin,), (end - begin,), start) if shape else Region((), (), start)
        return
    row_size = math.prod(shape[1:])
    first, last = begin // row_size, (end - 1) // row_size
    row = first
    while row <= last:
        inner_begin, inner_end = max(begin - row * row_size, 0), min(end - row * row_size, row_size)
        if (inner_begin, inner_end) == (0, row_size):
            rows = end // row_size - row
            yield Region((offset[0] + row, *offset[1:]), (rows, *shape[1:]), start)
            start += rows * row_size
            row += rows
            continue
        for inner in _stretch(offset[1:], shape[1:], inner_begin, inner_end, start):
            yield Region((offset[0] + row, *inner.offset), (1, *inner.shape), inner.start)
        start += inner_end - inner_begin
        row += 1


def intersection(first: Region, second: Region) -> tuple[Shape, Shape] | None:
    """Offset and shape, in the global tensor, of the box that two regions share; None if they share none."""
    offset, shape = [], []
    for start_1, size_1, start_2, size_2 in zip(
        first.offset, first.shape, second.offset, second.shape, strict=True
    ):
        start, end = max(start_1, start_2), min(start_1 + size_1, start_2 + size_2)
        if end <= start:
            return None
        offset.append(start)
        shape.append(end - start)
    return tuple(offset), tuple(shape)


def coverage_fault(shape: Shape, regions: Sequence[Region]) -> str | None:
    """Why ``regions`` do not cover a tensor of ``shape`` exactly once; None if they do."""
    for region in regions:
        if any(
            start < 0 or start + size > whole
            for start, size, whole in zip(region.offset, region.shape, shape, strict=True)
        ):
            return f"a part at offset {region.offset} of shape {region.shape} lies outside the shape {shape}"
    clash = _overlap(regions)
    if clash is not None:
        return f"two parts overlap, at offsets {clash[0].offset} and {clash[1].offset}"
    covered = sum(math.prod(region.shape) for region in regions)
    if covered != math.prod(shape):
        return f"the parts hold {covered} of {math.prod(shape)} values"
    return None


def _overlap(regions: Sequence[Region]) -> tuple[Region, Region] | None:
    """A pair of regions that share values, found by a sweep along the first dimension; None if there is none."""
    active: list[Region] = []
    for region in sorted(regions, key=lambda item: item.offset):
        if region.offset:
            active = [other for other in active if other.offset[0] + other.shape[0] > region.offset[0]]
        for other in active:
            if intersection(other, region):
                return other, region
        active.append(region)
    return None
