"""What a paradigm takes of the condition image beside its latents, made by the frozen encoders.

The same for a sample that is prepared, one that is encoded while training, and a video that is sampled.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from megatron_flashi2v.conditioning.wan_i2v import GREY_CLIP, IMAGE_ROWS
from megatron_flashi2v.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_flashi2v.encoders.image import ImageEncoder
    from megatron_flashi2v.encoders.video_vae import VideoVAE


def encode_image_inputs(
    names: Collection[str], image_BC1HW: torch.Tensor, frames: int, vae: VideoVAE, image_encoder: ImageEncoder | None
) -> dict[str, torch.Tensor]:
    """The tensors of these names (``ImageConditioning.stored_inputs``), fp32, one row per image.

    Args:
        names: of the tensors.
        image_BC1HW: RGB in [-1, 1].
        frames: video frames of the clip that the image begins.
        vae: makes latents.
        image_encoder: makes rows; None where no name asks for them.

    Raises:
        ConfigError: no encoder here makes a tensor of that name.
    """
    found = {}
    for name in names:
        if name == GREY_CLIP:
            found[name] = vae.encode_with_grey(image_BC1HW, frames)
        elif name == IMAGE_ROWS and image_encoder is not None:
            found[name] = image_encoder.encode(image_BC1HW[:, :, 0])
        else:
            raise ConfigError(f"no encoder is given that makes {name}, which the paradigm takes of the image")
    return found
