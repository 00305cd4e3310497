"""Every paradigm's name makes its module; text_to_video leaves the latents alone."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

from megatron_flashi2v.conditioning.build import CLASSES, build_conditioning
from megatron_flashi2v.conditioning.interface import ImageConditioning, stack_extras
from megatron_flashi2v.conditioning.text_to_video import TextToVideo
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import PARADIGMS, ModelConfig
from megatron_flashi2v.config.train import DataArguments, ModelArguments
from megatron_flashi2v.models.patches import patchify
from megatron_flashi2v.runtime.random import keyed_generator

CONFIG = ModelConfig(num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=4)


def test_flag_configuration_and_classes_name_the_same_paradigms() -> None:
    flag = typing.get_args(typing.get_type_hints(ModelArguments)["conditioning"])
    assert flag == PARADIGMS == tuple(CLASSES)


@pytest.mark.parametrize("name", PARADIGMS)
def test_every_paradigm_gives_what_the_first_stage_embeds(name: str) -> None:
    module = build_conditioning(dataclasses.replace(CONFIG, conditioning=name), None, torch.float32)
    assert isinstance(module, ImageConditioning)
    noisy, image = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 4, 1, 4, 6)
    rows = [
        module.training_extras(DataArguments(), (4, 1, 4, 6), lambda purpose, row=row: keyed_generator(1, purpose, row))
        for row in range(2)
    ]
    conditioned = module(noisy, image, stack_extras(rows))
    assert conditioned.latents_BCTHW.shape == (2, module.input_channels, 3, 4, 6)
    assert conditioned.latents_BCTHW.dtype == torch.float32
    if conditioned.guidance_BCTHW is not None:
        assert module.embed_guidance(patchify(conditioned.guidance_BCTHW, CONFIG.patch_size)).shape == (18, 2, 32)


def test_text_to_video_has_no_parameters_and_passes_the_latents_on() -> None:
    module = TextToVideo(CONFIG)
    noisy = torch.randn(1, 4, 2, 4, 4)
    conditioned = module(noisy, torch.randn(1, 4, 1, 4, 4), {})
    assert conditioned.latents_BCTHW is noisy and conditioned.guidance_BCTHW is None
    assert not list(module.parameters()) and not module.token_modules
    with pytest.raises(TypeError, match="TextToVideo has no guidance"):
        module.embed_guidance(torch.zeros(1, 1, 16))


def test_an_unknown_name_lists_the_choices() -> None:
    config = dataclasses.replace(CONFIG)
    object.__setattr__(config, "conditioning", "svd")  # the configuration itself refuses it as well
    with pytest.raises(ConfigError, match="'svd'.*flashi2v, repeat_concat, zero_pad_concat, inpainting, text_to_video"):
        build_conditioning(config, None, torch.float32)
