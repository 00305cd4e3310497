"""Inpainting (SEINE, arXiv 2310.20700; Wan2.1 and 2.2 I2V, arXiv 2503.20314): a mask says which frames are given.

    x_in = [x_t ; mask ; (z_0, 0, ..., 0)]      C + M + C channels, 16 + 4 + 16 = 36 for Wan

The mask has one value per video frame, 1 where the frame is given. Its temporal stride of M frames is folded into
channels: latent frame 0 holds video frame 0 M times (the causal VAE compresses it alone), latent frame t > 0 holds
video frames M(t-1)+1 to Mt. With one image given, all M channels are 1 at latent frame 0, and 0 after it.

Wan fills the frames that are not given with zero *pixels* and encodes the whole clip, so that its latents after frame 0
are those of grey frames seen after the image; ``wan_i2v.py`` does the same. Here they are zero *latents*: prepared
latents suffice, the VAE is not needed in the training loop, and the mask says as much. Latent frame 0 is the same in
both, as the VAE is causal. A run can start from the weights of Wan's I2V models, which were trained on the former.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras, ImageConditioning
from megatron_flashi2v.config.model import ModelConfig


def over_frames(first_BC1HW: Tensor, frames: int) -> Tensor:
    """The first latent frame with zeros after it, [B, C, T, H, W]."""
    return F.pad(first_BC1HW, (0, 0, 0, 0, 0, frames - 1))


def first_frame_mask(latents_BCTHW: Tensor, channels: int) -> Tensor:
    """The folded mask of a clip whose first frame is given, fp32 [B, M, T, H, W]."""
    batch, _, frames, height, width = latents_BCTHW.shape
    return over_frames(latents_BCTHW.new_ones((batch, channels, 1, height, width), dtype=torch.float32), frames)


class Inpainting(ImageConditioning):
    """Mask channels and the image at latent frame 0, beside the latents' channels, in Wan's order."""

    name = "inpainting"
    config_fields: ClassVar[tuple[str, ...]] = ("mask_channels",)
    wan_model_type = "i2v"

    def __init__(self, config: ModelConfig, *unused: object) -> None:
        super().__init__(config)
        self.mask_channels = config.mask_channels

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Concatenate the folded mask and the image, padded with zero latents to all frames."""
        image_BCTHW = over_frames(image_latents_BC1HW.float(), noisy_BCTHW.shape[2])
        mask_BMTHW = first_frame_mask(noisy_BCTHW, self.mask_channels)
        return ConditionedInput(torch.cat([noisy_BCTHW.float(), mask_BMTHW, image_BCTHW], dim=1))

    @classmethod
    def added_channels(cls, config: ModelConfig) -> int:
        """The mask's and the image latents'."""
        return config.mask_channels + config.latent_channels

    @classmethod
    def fit_to_data(
        cls, config: ModelConfig, temporal_stride: int | None, inputs: Mapping[str, tuple[int, ...]]
    ) -> ModelConfig:
        """The mask has as many channels as a latent frame has video frames."""
        return config if temporal_stride is None else dataclasses.replace(config, mask_channels=temporal_stride)

    @classmethod
    def starts_from(cls, other: type[ImageConditioning], config: ModelConfig) -> bool:
        """From models of the latents alone, and from others with a mask in the same channels."""
        return super().starts_from(other, config) or issubclass(other, Inpainting)

    @classmethod
    def card_rows(cls, config: ModelConfig) -> dict[str, str]:
        """The mask's channels."""
        return {"mask channels": str(config.mask_channels)}
