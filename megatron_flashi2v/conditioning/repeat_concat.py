"""Repeating-concat with noise (Stable Video Diffusion, arXiv 2311.15127): every frame sees the whole image.

    x_in = [x_t ; repeat_T(z_0 + s * n)]        C + C channels

The same noisy image stands beside every latent frame. SVD also embeds the level s; here the model does not see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.image_noise import NoisyImageConcat, noisy_image
from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras


class RepeatConcat(NoisyImageConcat):
    """The noisy image repeated over time, beside the latents' channels."""

    name = "repeat_concat"

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Concatenate the noisy image, repeated over time."""
        image_BC1HW = noisy_image(image_latents_BC1HW, extras)
        repeated_BCTHW = image_BC1HW.expand(-1, -1, noisy_BCTHW.shape[2], -1, -1)
        return ConditionedInput(torch.cat([noisy_BCTHW.float(), repeated_BCTHW], dim=1))
