"""Wan's own image-to-video models (Wan2.1 I2V and Wan2.2 I2V-A14B, arXiv 2503.20314), as they were trained.

    x_in = [x_t ; mask ; y]      C + M + C channels, 16 + 4 + 16 = 36 for Wan

y are the latents of the clip "the image, then mid grey" over all frames, and the mask is that of ``inpainting``. In
Wan2.1's models every block also attends to the rows of CLIP's vision model for the image, by keys and values of their
own; Wan2.2's have no such branch (``image_dim`` 0). y and the rows are stored with a sample, as a VAE and an image
encoder make them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.inpainting import Inpainting, first_frame_mask
from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras, ForeignModel
from megatron_flashi2v.config.model import ModelConfig

WAN_TEMPORAL_STRIDE = 4
"""Video frames for each latent frame of Wan's VAEs."""
GREY_CLIP = "grey_clip"
"""Name of y in a sample and among the extras."""
IMAGE_ROWS = "image_rows"
"""Name of the image encoder's rows, likewise."""


class WanI2V(Inpainting):
    """The mask and the encoded clip of image and grey beside the latents; CLIP's rows for the blocks."""

    name = "wan_i2v"
    config_fields = ("mask_channels", "image_dim", "image_rows")
    told_by = f"twice as many and {WAN_TEMPORAL_STRIDE}"

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """Concatenate the folded mask and y; hand on the image encoder's rows."""
        mask_BMTHW = first_frame_mask(noisy_BCTHW, self.mask_channels)
        latents_BCTHW = torch.cat([noisy_BCTHW.float(), mask_BMTHW, extras[GREY_CLIP].float()], dim=1)
        return ConditionedInput(latents_BCTHW, image_rows_BRX=extras.get(IMAGE_ROWS))

    @classmethod
    def stored_inputs(cls, config: ModelConfig, latent_shape: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """y, and the rows where the model has the branch for them."""
        shapes = {GREY_CLIP: tuple(latent_shape)}
        if config.image_dim:
            shapes[IMAGE_ROWS] = (config.image_rows, config.image_dim)
        return shapes

    @classmethod
    def fit_to_data(
        cls, config: ModelConfig, temporal_stride: int | None, inputs: Mapping[str, tuple[int, ...]]
    ) -> ModelConfig:
        """The mask's channels, and as many rows as the data's image encoder makes."""
        rows = inputs[IMAGE_ROWS][0] if IMAGE_ROWS in inputs else config.image_rows
        return dataclasses.replace(super().fit_to_data(config, temporal_stride, inputs), image_rows=rows)

    @classmethod
    def image_rows(cls, config: ModelConfig) -> int:
        """CLIP's rows, unless the model has no branch for them."""
        return config.image_rows if config.image_dim else 0

    @classmethod
    def meaningful_fields(cls, config: ModelConfig) -> tuple[str, ...]:
        """Without the branch the number of rows means nothing."""
        return tuple(field for field in cls.config_fields if field != "image_rows" or config.image_dim)

    @classmethod
    def recognise(cls, foreign: ForeignModel) -> dict[str, Any] | None:
        """By the mask's channels, as many as Wan's VAEs have frames for each latent frame."""
        mask_channels = foreign.input_channels - 2 * foreign.latent_channels
        if mask_channels != WAN_TEMPORAL_STRIDE:
            return None
        return {"mask_channels": mask_channels, "image_dim": foreign.image_dim}

    @classmethod
    def card_rows(cls, config: ModelConfig) -> dict[str, str]:
        """The mask's channels and the image encoder's rows."""
        rows = f"{config.image_rows} of width {config.image_dim}" if config.image_dim else "none"
        return {**super().card_rows(config), "rows of the image encoder": rows}
