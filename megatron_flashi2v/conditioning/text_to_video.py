"""No image at all: the T2V model that every paradigm starts from.

    x_in = x_t
"""

from __future__ import annotations

from torch import Tensor

from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras, ImageConditioning


class TextToVideo(ImageConditioning):
    """The noisy latents alone."""

    uses_image = False

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """The noisy latents as they are."""
        return ConditionedInput(noisy_BCTHW)
