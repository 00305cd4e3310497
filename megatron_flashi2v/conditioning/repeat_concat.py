"""Repeating-concat with noise (Stable Video Diffusion, arXiv 2311.15127): every frame sees the whole image.

    x_in = [x_t ; repeat_T(z_0 + s * n)]        C + C channels

The same noisy image stands beside every latent frame. SVD also embeds the level s; here the model does not see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.image_noise import draw_sampling_noise, draw_training_noise, noisy_image
from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras, GeneratorOf, ImageConditioning
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.config.train import DataArguments


class RepeatConcat(ImageConditioning):
    """The noisy image repeated over time, beside the latents' channels."""

    @classmethod
    def added_channels(cls, config: ModelConfig) -> int:
        """Those of the image's latents."""
        return config.latent_channels

    @classmethod
    def training_extras(
        cls, data: DataArguments, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """Noise on the image at a log-normal level."""
        return draw_training_noise(data, image_shape, generator_of)

    @classmethod
    def sampling_extras(
        cls, settings: ImageSettings, image_shape: tuple[int, int, int, int], generator_of: GeneratorOf
    ) -> dict[str, Tensor]:
        """Noise on the image at the level that was set."""
        return draw_sampling_noise(settings, image_shape, generator_of)

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Concatenate the noisy image, repeated over time."""
        image_BC1HW = noisy_image(image_latents_BC1HW, extras)
        repeated_BCTHW = image_BC1HW.expand(-1, -1, noisy_BCTHW.shape[2], -1, -1)
        return ConditionedInput(torch.cat([noisy_BCTHW.float(), repeated_BCTHW], dim=1))
