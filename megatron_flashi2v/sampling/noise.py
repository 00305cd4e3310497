"""Sampling's draws, which depend on the seed and on the sample's place in the list, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_flashi2v.conditioning.interface import ImageConditioning, stack_extras
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.runtime.random import keyed_generator

NOISE_PURPOSE = "sample-noise"


def sample_noise(seed: int, indices: Sequence[int], latent_shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise for some samples of a list.

    Every sample's noise comes from its own host generator, keyed by (seed, its index): its batch, rank and device do
    not change it, and two samples never share noise.

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


def sample_extras(
    paradigm: type[ImageConditioning],
    settings: ImageSettings,
    seed: int,
    indices: Sequence[int],
    latent_shape: Sequence[int],
) -> dict[str, torch.Tensor]:
    """The paradigm's settings and draws for the same samples, one row each, on the host; keyed as the noise is.

    Args:
        paradigm: of the model.
        settings: the user's.
        seed: as of :func:`sample_noise`, like the next two.
        indices: places of the samples in the user's list.
        latent_shape: (C, T, H, W) of one sample's latents.
    """
    channels, _, height, width = latent_shape

    def row(index: int) -> dict[str, torch.Tensor]:
        return paradigm.sampling_extras(
            settings,
            (channels, 1, height, width),
            lambda purpose: keyed_generator(seed, f"sample-{purpose}", index),
        )

    return stack_extras([row(index) for index in indices])
