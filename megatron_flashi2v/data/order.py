"""The order in which training visits the samples: one global order, keyed by the seed, the same for every layout.

Nothing here depends on ranks, workers or micro-batches: a position of the order (samples consumed so far, over all
ranks) names the same sample in every layout, and any position can be asked first. So the state of loading is one
integer, and a run resumed in a later epoch sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.random import keyed_generator, keyed_seed

BLOCK = 10_000
"""Positions over which a blend's weights hold exactly; a weight counts in steps of 1 / BLOCK."""
CACHED_BLOCKS = 4
CACHED_EPOCHS = 2
"""A global batch spans at most two epochs, unless it is larger than the data set."""


class GlobalOrder:
    """One data set's order: a permutation of the samples per epoch, keyed by (seed, epoch).

    Args:
        num_samples: size of the data set, at least 1.
        seed: the run's seed.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ConfigError(f"the data set has {num_samples} samples; training needs at least 1")
        self.num_samples = num_samples
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=CACHED_EPOCHS)(
            functools.partial(_permutation, num_samples, seed)
        )

    def sample_index(self, position: int) -> int:
        """Index of the sample at a position of the global order; positions run through the epochs without end."""
        if position < 0:
            raise ValueError(f"position {position} is negative")
        epoch, offset = divmod(position, self.num_samples)
        return int(self._permutation(epoch)[offset])


def _permutation(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """int64 [num_samples]: the sample at every place of an epoch."""
    return torch.randperm(num_samples, generator=keyed_generator(seed, "data_order", epoch))


class Apportionment:
    """Deals the numbers 0, 1, 2, ... to parts in proportion to weights, in an order keyed by the seed.

    In every :data:`BLOCK` of numbers each part gets the same count, so the share of what came before any number is
    known without going through it.

    Args:
        weights: above 0; one for each part.
        seed: the run's seed.
        purpose: what is dealt, for the key.
    """

    def __init__(self, weights: Sequence[float], seed: int, purpose: str) -> None:
        self._counts = block_counts(weights)
        self._block = functools.lru_cache(maxsize=CACHED_BLOCKS)(
            functools.partial(_deal_block, tuple(self._counts), seed, purpose)
        )

    def locate(self, number: int) -> tuple[int, int]:
        """The part that the number belongs to, and how many earlier numbers do."""
        if len(self._counts) == 1:
            return 0, number
        block, offset = divmod(number, BLOCK)
        parts, ranks = self._block(block)
        part = int(parts[offset])
        return part, block * self._counts[part] + int(ranks[offset])


def _deal_block(counts: Sequence[int], seed: int, purpose: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [BLOCK] each: the part of every number, and how many before it in the block have the same part."""
    dealt = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    parts = dealt[torch.randperm(BLOCK, generator=keyed_generator(seed, purpose, block))]
    ranks = torch.empty_like(parts)
    for part, count in enumerate(counts):
        ranks[parts == part] = torch.arange(count)
    return parts, ranks


def block_counts(weights: Sequence[float]) -> list[int]:
    """Deal :data:`BLOCK` numbers to the parts: at least one each, and else in proportion (largest remainders)."""
    if not 0 < len(weights) <= BLOCK:
        raise ConfigError(f"{len(weights)} parts are blended; 1 to {BLOCK} can be")
    total = sum(weights)
    exact = [weight / total * BLOCK for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) < BLOCK:
        counts[max(range(len(counts)), key=lambda part: (exact[part] - counts[part], -part))] += 1
    while sum(counts) > BLOCK:
        counts[max(range(len(counts)), key=lambda part: (counts[part] > 1, counts[part] - exact[part], -part))] -= 1
    return counts


class BlendOrder:
    """The order of several data sets together.

    Each global batch is of one bucket (data sets whose samples have one shape), and inside a bucket each position is
    of one data set; both are dealt by weight. Each data set is visited epoch by epoch in its own order.

    Args:
        sizes: samples of each data set.
        weights: its share of the positions, relative to the others'.
        buckets: the bucket of each data set, numbered from 0 without gaps.
        batch: samples of a global batch; it matters only where there are several buckets.
        seed: the run's seed.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], buckets: Sequence[int], batch: int, seed: int
    ) -> None:
        self.num_buckets = max(buckets) + 1
        self._sizes, self._batch, self._seed = sizes, batch, seed
        self._members = [
            [number for number, of in enumerate(buckets) if of == bucket] for bucket in range(self.num_buckets)
        ]
        shares = [sum(weights[number] for number in members) for members in self._members]
        self._bucket_of_batch = Apportionment(shares, seed, "bucket_order")
        self._inside = [
            Apportionment([weights[number] for number in members], seed, f"blend_order {bucket}")
            for bucket, members in enumerate(self._members)
        ]
        # Data sets of one size would else be visited in the same order.
        seeds = [seed if number == 0 else keyed_seed(seed, "blended_data_set", number) for number in range(len(sizes))]
        self._orders = [GlobalOrder(size, own) for size, own in zip(sizes, seeds, strict=True)]

    def bucket(self, position: int) -> int:
        """The bucket of a position."""
        return self._bucket_of_batch.locate(position // self._batch)[0]

    def locate(self, position: int) -> tuple[int, int]:
        """Data set and sample index at a position."""
        if self.num_buckets == 1:
            bucket, inside = 0, position
        else:
            number, offset = divmod(position, self._batch)
            bucket, earlier = self._bucket_of_batch.locate(number)
            inside = earlier * self._batch + offset
        part, rank = self._inside[bucket].locate(inside)
        number = self._members[bucket][part]
        return number, self._orders[number].sample_index(rank)

    def substitute(self, position: int, attempt: int) -> tuple[int, int]:
        """Choose what fills a position whose sample is bad: a sample of the same data set, keyed by (seed, position).

        Args:
            position: of the global order.
            attempt: 1 for the first substitute, 2 for the one where that is bad too, and so on.
        """
        number, _ = self.locate(position)
        return number, keyed_seed(self._seed, "substitute", position, attempt) % self._sizes[number]
