"""Boxes and stretches against an enumeration of every index."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from megatron_flashi2v.checkpoint.regions import (
    Region,
    coverage_fault,
    intersection,
    piece_regions,
)


def indices(region: Region) -> list[tuple[int, ...]]:
    ranges = (range(start, start + size) for start, size in zip(region.offset, region.shape, strict=True))
    return list(itertools.product(*ranges))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (4, 1, 3, 2), (5, 1, 1)])
def test_every_stretch_of_a_box_is_its_regions_in_order(shape: tuple[int, ...]) -> None:
    offset = tuple(range(10, 10 + len(shape)))
    in_order = indices(Region(offset, shape, None))
    for begin in range(len(in_order) + 1):
        for end in range(begin, len(in_order) + 1):
            regions = piece_regions(offset, shape, (begin, end))
            assert [index for region in regions for index in indices(region)] == in_order[begin:end]
            assert len(regions) <= max(1, 2 * len(shape) - 1)
            starts = [0, *itertools.accumulate(math.prod(region.shape) for region in regions)]
            assert [region.start for region in regions] == starts[:-1]


def test_intersection_equals_the_common_indices() -> None:
    random.seed(1)
    for _ in range(200):
        first, second = (
            Region(
                tuple(random.randrange(4) for _ in range(3)),
                tuple(random.randrange(1, 4) for _ in range(3)),
                None,
            )
            for _ in range(2)
        )
        common = set(indices(first)) & set(indices(second))
        shared = intersection(first, second)
        assert (set(indices(Region(*shared, None))) if shared else set()) == common


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ([Region((0, 0), (2, 3), None), Region((2, 0), (2, 3), None)], None),
        ([Region((0, 0), (2, 3), None)], "6 of 12"),
        ([Region((0, 0), (3, 3), None), Region((2, 0), (2, 3), None)], "overlap"),
        ([Region((0, 0), (4, 3), None), Region((1, 1), (1, 1), None)], "overlap"),
        ([Region((0, 0), (4, 2), None), Region((0, 2), (4, 2), None)], "outside"),
        # As many values as the tensor has, but a hole and an overlap.
        ([Region((0, 0), (2, 3), None), Region((1, 0), (2, 3), None)], "overlap"),
        ([], "0 of 12"),
    ],
)
def test_coverage(regions: list[Region], words: str | None) -> None:
    fault = coverage_fault((4, 3), regions)
    assert (fault is None) if words is None else (fault is not None and words in fault)
