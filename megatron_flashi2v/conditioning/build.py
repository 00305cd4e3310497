"""From a paradigm's name to its class and its module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.flashi2v import FlashI2V
from megatron_flashi2v.conditioning.inpainting import Inpainting
from megatron_flashi2v.conditioning.interface import ImageConditioning
from megatron_flashi2v.conditioning.repeat_concat import RepeatConcat
from megatron_flashi2v.conditioning.text_to_video import TextToVideo
from megatron_flashi2v.conditioning.zero_pad_concat import ZeroPadConcat
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig

CLASSES: Mapping[str, type[ImageConditioning]] = {
    "flashi2v": FlashI2V,
    "repeat_concat": RepeatConcat,
    "zero_pad_concat": ZeroPadConcat,
    "inpainting": Inpainting,
    "text_to_video": TextToVideo,
}


def paradigm_of(config: ModelConfig) -> type[ImageConditioning]:
    """The class of ``config.conditioning``.

    Raises:
        ConfigError: an unknown paradigm.
    """
    if config.conditioning not in CLASSES:
        raise ConfigError(f"conditioning is {config.conditioning!r}; choose one of {', '.join(CLASSES)}")
    return CLASSES[config.conditioning]


def input_channels(config: ModelConfig) -> int:
    """Channels of the patch embedding's input."""
    return config.latent_channels + paradigm_of(config).added_channels(config)


def build_conditioning(
    config: ModelConfig, highpass: Callable[..., Tensor] | None, dtype: torch.dtype
) -> ImageConditioning:
    """The module of ``config.conditioning``.

    Args:
        config: the model's configuration.
        highpass: the chosen implementation of the Fourier high-pass.
        dtype: dtype of matrix products.

    Raises:
        ConfigError: an unknown paradigm.
    """
    return paradigm_of(config)(config, highpass, dtype)
