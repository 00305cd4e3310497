"""The list of paradigms: from a name to its class, and from a model's configuration to its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_flashi2v.conditioning.flashi2v import FlashI2V
from megatron_flashi2v.conditioning.inpainting import Inpainting
from megatron_flashi2v.conditioning.interface import ForeignModel, ImageConditioning
from megatron_flashi2v.conditioning.repeat_concat import RepeatConcat
from megatron_flashi2v.conditioning.text_to_video import TextToVideo
from megatron_flashi2v.conditioning.wan_i2v import WanI2V
from megatron_flashi2v.conditioning.zero_pad_concat import ZeroPadConcat
from megatron_flashi2v.config.bounds import suggestion
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig

BUILT_IN: tuple[type[ImageConditioning], ...] = (
    FlashI2V, RepeatConcat, ZeroPadConcat, WanI2V, Inpainting, TextToVideo
)

BASE = TextToVideo
"""The paradigm that every other one extends."""

_registered = {paradigm.name: paradigm for paradigm in BUILT_IN}


def register(paradigm: type[ImageConditioning]) -> type[ImageConditioning]:
    """Make a paradigm of another package known by its ``name``; fit for a class decorator.

    Every process that reads such a model must call it first: training, converting, sampling and loading an export.

    Raises:
        ValueError: another paradigm has the name.
    """
    if _registered.setdefault(paradigm.name, paradigm) is not paradigm:
        raise ValueError(f"the paradigm {paradigm.name!r} is registered as {_registered[paradigm.name].__name__}")
    return paradigm


def paradigms() -> tuple[type[ImageConditioning], ...]:
    """All registered paradigms: the built-in ones, then others in the order of their registration."""
    return tuple(_registered.values())


def paradigm_of(config: ModelConfig) -> type[ImageConditioning]:
    """The class of ``config.conditioning``; errors as for :func:`paradigm_named`."""
    return paradigm_named(config.conditioning)


def paradigm_named(name: str) -> type[ImageConditioning]:
    """The registered class of that name.

    Raises:
        ConfigError: there is none; lists the names, with the nearest.
    """
    if name not in _registered:
        raise ConfigError(
            f"conditioning is {name!r}; choose one of {', '.join(_registered)}{suggestion(name, _registered)}"
        )
    return _registered[name]


def read_model_config(values: dict[str, Any], *, source: str) -> ModelConfig:
    """:meth:`ModelConfig.from_json`, with a registered paradigm.

    Raises:
        ConfigError: a key is unknown, missing or malformed, or the paradigm is unknown; names ``source``.
    """
    config = ModelConfig.from_json(values, source=source)
    try:
        paradigm_of(config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return config


def paradigm_fields() -> tuple[str, ...]:
    """Fields of :class:`ModelConfig` that only some paradigms read."""
    return tuple(dict.fromkeys(field for paradigm in paradigms() for field in paradigm.config_fields))


def recognise(foreign: ForeignModel) -> dict[str, Any] | None:
    """``conditioning`` and the paradigm's own fields of a model that comes without a configuration of ours.

    The first paradigm that recognises the weights is taken; those of other packages, which know what the built-in ones
    do not, are asked first. None where no paradigm does: see :func:`recognition_rules`.
    """
    for paradigm in sorted(paradigms(), key=BUILT_IN.__contains__):
        fields = paradigm.recognise(foreign)
        if fields is not None:
            return {"conditioning": paradigm.name, **fields}
    return None


def recognition_rules() -> str:
    """For a message: which input channels tell which paradigm."""
    return ", ".join(f"{paradigm.told_by} are {paradigm.name}" for paradigm in paradigms() if paradigm.told_by)


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
