"""Every paradigm's name makes its module; text_to_video leaves the latents alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from helpers.paradigms import PARADIGMS, stored_inputs

from megatron_flashi2v.conditioning import build
from megatron_flashi2v.conditioning.build import (
    build_conditioning,
    paradigm_named,
    paradigm_of,
    read_model_config,
    recognise,
    register,
)
from megatron_flashi2v.conditioning.interface import ForeignModel, ImageConditioning, stack_extras
from megatron_flashi2v.conditioning.text_to_video import TextToVideo
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import DataArguments
from megatron_flashi2v.models.patches import patchify
from megatron_flashi2v.runtime.random import keyed_generator

CONFIG = ModelConfig(num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=4)


def test_the_help_lists_the_built_in_paradigms() -> None:
    """The configuration cannot ask the list, which is above it."""
    told = subprocess.run(
        [sys.executable, "-m", "megatron_flashi2v", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    text = " ".join(told.replace("│", " ").split())
    assert f"Image-to-video paradigm: {', '.join(PARADIGMS[:-1])} or {PARADIGMS[-1]}." in text


@pytest.mark.parametrize("name", PARADIGMS)
def test_every_paradigm_gives_what_the_first_stage_embeds(name: str) -> None:
    config = dataclasses.replace(CONFIG, conditioning=name)
    module = build_conditioning(config, None, torch.float32)
    assert isinstance(module, ImageConditioning)
    noisy, image = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 4, 1, 4, 6)
    rows = [
        module.training_extras(DataArguments(), (4, 1, 4, 6), lambda purpose, row=row: keyed_generator(1, purpose, row))
        for row in range(2)
    ]
    conditioned = module(noisy, image, {**stack_extras(rows), **stored_inputs(config, noisy)})
    assert conditioned.latents_BCTHW.shape == (2, module.input_channels, 3, 4, 6)
    assert conditioned.latents_BCTHW.dtype == torch.float32
    rows_BRX, count = conditioned.image_rows_BRX, paradigm_of(config).image_rows(config)
    assert (0 if rows_BRX is None else rows_BRX.shape[1]) == count
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
    config = dataclasses.replace(CONFIG, conditioning="svd")
    with pytest.raises(ConfigError, match="'svd'.*zero_pad_concat, wan_i2v, inpainting, text_to_video"):
        build_conditioning(config, None, torch.float32)
    with pytest.raises(ConfigError, match="conditioning is 'inpaintng'.*; did you mean inpainting"):
        paradigm_named("inpaintng")


def test_an_unknown_name_in_a_file_names_the_file() -> None:
    values = {**CONFIG.to_json(), "conditioning": "svd"}
    with pytest.raises(ConfigError, match="a/model_config.json: conditioning is 'svd'; choose one of"):
        read_model_config(values, source="a/model_config.json")
    with pytest.raises(ConfigError, match="a.json: conditioning is 3; it must be a paradigm's name"):
        read_model_config({**values, "conditioning": 3}, source="a.json")


def test_a_name_is_registered_once() -> None:
    class Other(TextToVideo):
        pass

    assert register(TextToVideo) is TextToVideo  # again, as a notebook does
    with pytest.raises(ValueError, match="'text_to_video' is registered as TextToVideo"):
        register(Other)


@pytest.mark.parametrize("name", PARADIGMS)
def test_own_tensors_are_the_modules_parameters(name: str) -> None:
    config = dataclasses.replace(CONFIG, conditioning=name, phi_kernel_size=(3, 5, 7), patch_size=(1, 2, 3))
    module = build_conditioning(config, None, torch.float32)
    found = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    assert found == [(name, tensor.shape) for name, tensor in module.own_tensors(config).items()]
    assert not list(module.buffers())  # a checkpoint holds parameters alone


def test_weights_without_a_configuration_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fields(
        channels: int, column: str = "wan", image_dim: int = 0, **shapes: tuple[int, ...]
    ) -> dict[str, object] | None:
        return recognise(ForeignModel(
            latent_channels=16, input_channels=channels, column=column, image_dim=image_dim,
            shape_of=lambda name, dimensions: shapes.get(name.replace(".", "_")),
        ))  # fmt: skip

    assert fields(16) == {"conditioning": "text_to_video"} and fields(32) is None
    wan = {"conditioning": "wan_i2v", "mask_channels": 4}
    assert fields(36) == {**wan, "image_dim": 0} and fields(36, image_dim=1280) == {**wan, "image_dim": 1280}
    phi = {"conditioning": "flashi2v", "phi_hidden_channels": 64, "phi_kernel_size": (1, 3, 3)}
    assert fields(16, learnable_proj_proj_0_weight=(64, 16, 1, 3, 3)) == phi
    assert fields(16, "flashi2v_npu", learnable_proj_0_weight=(64, 16, 1, 3, 3)) == phi

    class Doubled(TextToVideo):
        name = "doubled"

        @classmethod
        def recognise(cls, foreign: ForeignModel) -> dict[str, object] | None:
            return {} if foreign.input_channels in (16, 32) else None

    monkeypatch.setattr(build, "_registered", dict(build._registered))
    register(Doubled)
    assert fields(32) == fields(16) == {"conditioning": "doubled"}  # asked before the built-in ones
    assert fields(36) == {**wan, "image_dim": 0}
