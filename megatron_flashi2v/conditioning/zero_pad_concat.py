"""Zero-padding concat with noise (CogVideoX, arXiv 2408.06072): the first frame sees the image, the others zeros.

    x_in = [x_t ; (z_0 + s * n, 0, ..., 0)]     C + C channels
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_flashi2v.conditioning.image_noise import NoisyImageConcat, noisy_image
from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras


class ZeroPadConcat(NoisyImageConcat):
    """The noisy image at latent frame 0 and zeros after it, beside the latents' channels."""

    name = "zero_pad_concat"

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Concatenate the noisy image, padded with zero latents to all frames."""
        image_BC1HW = noisy_image(image_latents_BC1HW, extras)
        padded_BCTHW = F.pad(image_BC1HW, (0, 0, 0, 0, 0, noisy_BCTHW.shape[2] - 1))
        return ConditionedInput(torch.cat([noisy_BCTHW.float(), padded_BCTHW], dim=1))
