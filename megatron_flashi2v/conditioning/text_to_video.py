"""No image at all: the T2V model that every paradigm starts from.

    x_in = x_t
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras, ForeignModel, ImageConditioning


class TextToVideo(ImageConditioning):
    """The noisy latents alone."""

    name = "text_to_video"
    uses_image = False
    told_by = "as many"

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """The noisy latents as they are."""
        return ConditionedInput(noisy_BCTHW)

    @classmethod
    def recognise(cls, foreign: ForeignModel) -> dict[str, Any] | None:
        """By an input of the latents alone."""
        return {} if foreign.input_channels == foreign.latent_channels else None
