"""No image at all: the T2V model that every paradigm starts from."""

from __future__ import annotations

from torch import Tensor

from megatron_flashi2v.conditioning.interface import ConditionedInput, ImageConditioning
from megatron_flashi2v.config.model import ModelConfig


class TextToVideo(ImageConditioning):
    """x_in = x_t."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_channels = config.latent_channels

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, cutoff_ratio_B: Tensor) -> ConditionedInput:
        """The noisy latents as they are."""
        return ConditionedInput(noisy_BCTHW)
