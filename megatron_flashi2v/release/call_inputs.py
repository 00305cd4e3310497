"""What a call of ``FlashI2VPipeline`` is given, for each of its videos.

Shape suffixes: B samples, L text rows, D text width.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_flashi2v.config.errors import ConfigError

Seeds = list[tuple[int, int]]
"""The seed and the index that key each video's noise."""


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Seeds:
    """A single generator keys by its seed and the video's place, a list by each one's seed."""
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} videos; give one for each, or one for all")
        return [(single.initial_seed(), 0) for single in generator]
    seed = secrets.randbits(63) if generator is None else generator.initial_seed()
    return [(seed, index) for index in range(count)]


def separate_images(image: Any) -> Any:
    """Arrays and tensors of several images as a list of them."""
    return list(image) if getattr(image, "ndim", 0) == 4 else image


def spread_rows(rows_BLD: Tensor, places: int, repeats: int) -> Tensor:
    """Text rows for each video: one prompt's serve all places, and each place has so many videos."""
    if len(rows_BLD) not in (1, places):
        raise ConfigError(f"there are text rows of {len(rows_BLD)} prompts for {places} images and prompts")
    return rows_BLD.expand(places, -1, -1).repeat_interleave(repeats, dim=0)
