"""Noise on the condition image, which keeps a model that is given the whole image from copying it.

    z_0 + s * n,    n ~ N(0, 1),    ln s ~ N(mean, std^2) in training, s fixed when sampling

Stable Video Diffusion (arXiv 2311.15127) and CogVideoX (arXiv 2408.06072) train with mean -3 and std 0.5, and add the
noise to pixels before they encode them. Here it is added to the normalised latents, which are prepared once and do not
need the VAE in the training loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.interface import Extras, GeneratorOf, ImageConditioning
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.config.train import DataArguments

LEVEL, NOISE = "image_noise_level", "image_noise"


class NoisyImageConcat(ImageConditioning):
    """Channels and draws of the paradigms that concatenate a noisy image."""

    @classmethod
    def added_channels(cls, config: ModelConfig) -> int:
        """Those of the image's latents."""
        return config.latent_channels

    @classmethod
    def training_extras(
        cls, data: DataArguments, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """A log-normal level (a scalar) and noise of the image's shape (C, 1, H, W), fp32."""
        normal = torch.randn((), generator=generator_of("image-noise-level"))
        level = torch.exp(data.image_noise_log_mean + data.image_noise_log_std * normal)
        return {LEVEL: level, NOISE: torch.randn(image_shape, generator=generator_of("image-noise"))}

    @classmethod
    def sampling_extras(
        cls, settings: ImageSettings, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """The level of the settings, and noise of the image's shape."""
        level = torch.tensor(settings.image_noise, dtype=torch.float32)
        return {LEVEL: level, NOISE: torch.randn(image_shape, generator=generator_of("image-noise"))}


def noisy_image(image_latents_BC1HW: Tensor, extras: Extras) -> Tensor:
    """The image's latents with each sample's noise at its level, fp32 [B, C, 1, H, W]."""
    level_B1111 = extras[LEVEL].float().view(-1, 1, 1, 1, 1)
    return image_latents_BC1HW.float() + level_B1111 * extras[NOISE].float()
