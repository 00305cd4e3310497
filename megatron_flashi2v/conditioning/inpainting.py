"""Inpainting (SEINE, arXiv 2310.20700; Wan2.1 and 2.2 I2V, arXiv 2503.20314): a mask says which frames are given.

    x_in = [x_t ; mask ; (z_0, 0, ..., 0)]      C + M + C channels, 16 + 4 + 16 = 36 for Wan

The mask has one value per video frame, 1 where the frame is given. Its temporal stride of M frames is folded into
channels: latent frame 0 holds video frame 0 M times (the causal VAE compresses it alone), latent frame t > 0 holds
video frames M(t-1)+1 to Mt. With one image given, all M channels are 1 at latent frame 0, and 0 after it.

Wan fills the frames that are not given with zero *pixels* and encodes the whole clip, so that its latents after frame 0
are those of grey frames seen after the image. Here they are zero *latents*: prepared latents suffice, the VAE is not
needed in the training loop, and the mask says as much. Latent frame 0 is the same in both, as the VAE is causal. The
weights of Wan2.2's I2V models fit in shape, but were trained on the former.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras, ForeignModel, ImageConditioning
from megatron_flashi2v.config.model import ModelConfig

WAN_TEMPORAL_STRIDE = 4
"""Video frames for each latent frame of Wan's VAEs."""


class Inpainting(ImageConditioning):
    """Mask channels and the image at latent frame 0, beside the latents' channels, in Wan's order."""

    name = "inpainting"
    config_fields = ("mask_channels",)
    wan_model_type = "i2v"
    told_by = f"twice as many and {WAN_TEMPORAL_STRIDE}"

    def __init__(self, config: ModelConfig, *unused: object) -> None:
        super().__init__(config)
        self.mask_channels = config.mask_channels

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Concatenate the folded mask and the image, padded with zero latents to all frames."""
        batch, _, frames, height, width = noisy_BCTHW.shape
        given_BM1HW = noisy_BCTHW.new_ones((batch, self.mask_channels, 1, height, width), dtype=torch.float32)
        known_BC1HW = torch.cat([given_BM1HW, image_latents_BC1HW.float()], dim=1)
        known_BCTHW = F.pad(known_BC1HW, (0, 0, 0, 0, 0, frames - 1))
        return ConditionedInput(torch.cat([noisy_BCTHW.float(), known_BCTHW], dim=1))

    @classmethod
    def added_channels(cls, config: ModelConfig) -> int:
        """The mask's and the image latents'."""
        return config.mask_channels + config.latent_channels

    @classmethod
    def fit_to_data(cls, config: ModelConfig, temporal_stride: int) -> ModelConfig:
        """The mask has as many channels as a latent frame has video frames."""
        return dataclasses.replace(config, mask_channels=temporal_stride)

    @classmethod
    def recognise(cls, foreign: ForeignModel) -> dict[str, Any] | None:
        """By the mask's channels, as many as Wan's VAEs have frames for each latent frame."""
        mask_channels = foreign.input_channels - 2 * foreign.latent_channels
        return {"mask_channels": mask_channels} if mask_channels == WAN_TEMPORAL_STRIDE else None

    @classmethod
    def card_rows(cls, config: ModelConfig) -> dict[str, str]:
        """The mask's channels."""
        return {"mask channels": str(config.mask_channels)}
