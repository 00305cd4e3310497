"""From a paradigm's name to its module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.flashi2v import FlashI2V
from megatron_flashi2v.conditioning.interface import ImageConditioning
from megatron_flashi2v.conditioning.text_to_video import TextToVideo
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import PARADIGMS, ModelConfig


def build_conditioning(config: ModelConfig, highpass: Callable[..., Tensor], dtype: torch.dtype) -> ImageConditioning:
    """The module of ``config.conditioning``.

    Args:
        config: the model's configuration.
        highpass: the chosen implementation of the Fourier high-pass.
        dtype: dtype of matrix products.

    Raises:
        ConfigError: an unknown paradigm.
    """
    if config.conditioning == "flashi2v":
        return FlashI2V(config, highpass, dtype)
    if config.conditioning == "text_to_video":
        return TextToVideo(config)
    raise ConfigError(f"conditioning is {config.conditioning!r}; choose one of {', '.join(PARADIGMS)}")
