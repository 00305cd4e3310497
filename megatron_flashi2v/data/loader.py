"""The order in which training visits the samples: one global order, keyed by the seed, the same for every layout."""

from __future__ import annotations

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.random import keyed_generator


class GlobalOrder:
    """A permutation of the samples per epoch, keyed by (seed, epoch).

    Nothing here depends on ranks, workers or batch sizes: position ``p`` (samples consumed so far, over all ranks)
    names the same sample in every layout, so a run resumed in a later epoch sees exactly what an uninterrupted run
    would have seen.

    Args:
        num_samples: size of the data set, at least 1.
        seed: the run's seed.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ConfigError(f"the data set has {num_samples} samples; training needs at least 1")
        self.num_samples = num_samples
        self.seed = seed
        self._permutations: dict[int, torch.Tensor] = {}

    def sample_index(self, position: int) -> int:
        """Index of the sample at a position of the global order; positions run through the epochs without end."""
        if position < 0:
            raise ValueError(f"position {position} is negative")
        epoch, offset = divmod(position, self.num_samples)
        return int(self._permutation(epoch)[offset])

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            # A global batch spans at most two epochs at a time unless it is larger than the data set.
            while len(self._permutations) >= 2:
                del self._permutations[min(self._permutations)]
            generator = keyed_generator(self.seed, "data_order", epoch)
            self._permutations[epoch] = torch.randperm(self.num_samples, generator=generator)
        return self._permutations[epoch]
