"""Initial noise that depends on the seed and on the sample's place in the list, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_flashi2v.runtime.random import keyed_generator

NOISE_PURPOSE = "sample-noise"


def sample_noise(seed: int, indices: Sequence[int], latent_shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise for some samples of a list.

    Every sample's noise comes from its own host generator, keyed by (seed, its index): neither the batch it is in,
    nor the rank, nor the device changes it, and two samples never share noise.

    Args:
        seed: the sampling seed.
        indices: places of the samples in the user's list, one per row of the result.
        latent_shape: (C, T, H, W) of one sample's latents.

    Returns:
        fp32 ``[len(indices), C, T, H, W]`` on the host.
    """
    return torch.stack(
        [
            torch.randn(
                tuple(latent_shape),
                generator=keyed_generator(seed, NOISE_PURPOSE, index),
                dtype=torch.float32,
            )
            for index in indices
        ]
    )
