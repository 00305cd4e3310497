"""Paradigms that concatenate, against a plain computation; what they draw, and what they take from the data."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.paradigms import PARADIGMS, stored_inputs
from torch import Tensor

from megatron_flashi2v.conditioning.build import BUILT_IN, build_conditioning, input_channels, paradigm_named
from megatron_flashi2v.conditioning.wan_i2v import WanI2V
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.config.train import DataArguments
from megatron_flashi2v.runtime.random import keyed_generator

CHANNELS, FRAMES, HEIGHT, WIDTH = 3, 4, 5, 6
IMAGE_SHAPE = (CHANNELS, 1, HEIGHT, WIDTH)
NOISY = ("repeat_concat", "zero_pad_concat")


def make_config(conditioning: str, mask_channels: int = 4) -> ModelConfig:
    return ModelConfig(
        num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=CHANNELS,
        conditioning=conditioning, mask_channels=mask_channels,
    )


def make_inputs(frames: int = FRAMES) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    extras = {"image_noise_level": torch.tensor([0.5, 0.01]), "image_noise": normal(2, *IMAGE_SHAPE)}
    return normal(2, CHANNELS, frames, HEIGHT, WIDTH), normal(2, *IMAGE_SHAPE), extras


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_the_noisy_image_stands_beside_the_latents(name: str, frames: int) -> None:
    noisy, image, extras = make_inputs(frames)
    module = build_conditioning(make_config(name), None, torch.float32)
    latents = module(noisy, image, extras).latents_BCTHW
    assert module.input_channels == input_channels(make_config(name)) == 2 * CHANNELS
    assert latents.shape == (2, 2 * CHANNELS, frames, HEIGHT, WIDTH)
    for sample, level in enumerate((0.5, 0.01)):
        expected = image[sample, :, 0] + level * extras["image_noise"][sample, :, 0]
        for frame in range(frames):
            seen = latents[sample, :, frame]
            assert torch.equal(seen[:CHANNELS], noisy[sample, :, frame])
            given = expected if frame == 0 or name == "repeat_concat" else torch.zeros_like(expected)
            torch.testing.assert_close(seen[CHANNELS:], given)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_inpainting_folds_the_mask_of_video_frames(stride: int) -> None:
    noisy, image, _ = make_inputs()
    module = build_conditioning(make_config("inpainting", stride), None, torch.float32)
    latents = module(noisy, image, {}).latents_BCTHW
    assert module.input_channels == latents.shape[1] == 2 * CHANNELS + stride
    # One value per video frame; the first is the only one given, and fills a latent frame of its own.
    video_mask = [1.0] + [0.0] * (stride * (FRAMES - 1))
    by_latent_frame = torch.tensor(video_mask[:1] * (stride - 1) + video_mask).view(FRAMES, stride)
    for frame in range(FRAMES):
        assert torch.equal(latents[:, :CHANNELS, frame], noisy[:, :, frame])
        for channel in range(stride):
            assert (latents[:, CHANNELS + channel, frame] == by_latent_frame[frame, channel]).all()
        given = image[:, :, 0] if frame == 0 else torch.zeros_like(image[:, :, 0])
        assert torch.equal(latents[:, CHANNELS + stride :, frame], given)


def test_wans_inpainting_has_36_channels() -> None:
    config = ModelConfig(
        num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, conditioning="inpainting"
    )
    assert input_channels(config) == 16 + 4 + 16


def test_inpainting_takes_the_mask_from_the_data_and_the_others_nothing() -> None:
    for paradigm in BUILT_IN:
        config = make_config(paradigm.name)
        mask = 2 if paradigm.name in ("inpainting", "wan_i2v") else 4
        assert paradigm.fit_to_data(config, 2, {}) == make_config(paradigm.name, mask)
        assert paradigm.fit_to_data(config, None, {}) == config


def test_wan_i2v_takes_the_number_of_rows_from_the_data() -> None:
    config = make_config("wan_i2v")
    assert WanI2V.fit_to_data(config, 4, {"image_rows": (17, 1280)}).image_rows == 17
    assert WanI2V.fit_to_data(config, 4, {}).image_rows == config.image_rows == 257


def test_wan_i2v_takes_the_encoded_clip_in_place_of_zeros() -> None:
    noisy, image, _ = make_inputs()
    config = make_config("wan_i2v")
    extras = stored_inputs(config, noisy)
    ours = build_conditioning(config, None, torch.float32)(noisy, image, extras)
    light = build_conditioning(make_config("inpainting"), None, torch.float32)(noisy, image, {})
    assert torch.equal(ours.latents_BCTHW[:, : CHANNELS + 4], light.latents_BCTHW[:, : CHANNELS + 4])
    assert torch.equal(ours.latents_BCTHW[:, CHANNELS + 4 :], extras["grey_clip"])
    assert ours.image_rows_BRX is extras["image_rows"] and light.image_rows_BRX is None


@pytest.mark.parametrize("name", PARADIGMS)
def test_latents_reach_the_patch_embedding_in_fp32(name: str) -> None:
    noisy, image, extras = (item.to(torch.bfloat16) if isinstance(item, Tensor) else item for item in make_inputs())
    module = build_conditioning(make_config(name), None, torch.bfloat16)
    extras["cutoff_ratio"] = torch.tensor([0.1, 0.5])
    extras.update(stored_inputs(make_config(name), noisy))
    conditioned = module(noisy.float(), image, extras).latents_BCTHW
    assert conditioned.dtype == torch.float32
    if name in NOISY:
        expected = image.float() + extras["image_noise_level"].view(2, 1, 1, 1, 1) * extras["image_noise"]
        torch.testing.assert_close(conditioned[:, CHANNELS:, :1], expected, rtol=1e-6, atol=1e-6)


def training_extras(name: str, position: int, seed: int = 0, **flags: float) -> dict[str, Tensor]:
    return paradigm_named(name).training_extras(
        DataArguments(**flags), IMAGE_SHAPE, lambda purpose: keyed_generator(seed, purpose, position)
    )


@pytest.mark.parametrize("name", NOISY)
def test_training_noise_is_log_normal_and_keyed(name: str) -> None:
    rows = [training_extras(name, position) for position in range(400)]
    levels = torch.stack([row["image_noise_level"] for row in rows]).log()
    assert levels.mean().item() == pytest.approx(-3.0, abs=0.08) and levels.std().item() == pytest.approx(0.5, abs=0.06)
    noise = torch.stack([row["image_noise"] for row in rows])
    assert noise.shape == (400, *IMAGE_SHAPE) and noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.03) and noise.std().item() == pytest.approx(1, abs=0.03)
    assert len(noise.flatten(1).unique(dim=0)) == 400
    again, other = training_extras(name, 7), training_extras(name, 7, seed=1)
    for key, value in rows[7].items():
        assert torch.equal(value, again[key]) and not torch.equal(value, other[key])


@pytest.mark.parametrize("name", NOISY)
def test_level_and_noise_are_independent_draws(name: str) -> None:
    asked: list[str] = []

    def generator_of(purpose: str) -> torch.Generator:
        asked.append(purpose)
        return keyed_generator(0, purpose, 0)

    paradigm_named(name).training_extras(DataArguments(), IMAGE_SHAPE, generator_of)
    assert len(asked) == len(set(asked)) == 2


def test_flags_set_the_distribution_of_the_level() -> None:
    row = training_extras("repeat_concat", 0, image_noise_log_mean=-1.5, image_noise_log_std=0.0)
    assert row["image_noise_level"].item() == pytest.approx(math.exp(-1.5))


@pytest.mark.parametrize("name", PARADIGMS)
def test_sampling_takes_the_users_settings(name: str) -> None:
    settings = ImageSettings(cutoff_ratio=0.3, image_noise=0.07)
    row = paradigm_named(name).sampling_extras(settings, IMAGE_SHAPE, lambda purpose: keyed_generator(0, purpose, 0))
    assert row.keys() == training_extras(name, 0).keys()
    for key, expected in (("cutoff_ratio", 0.3), ("image_noise_level", 0.07)):
        if key in row:
            assert row[key].item() == pytest.approx(expected) and row[key].dtype == torch.float32
    assert bool(row) == (name in (*NOISY, "flashi2v"))


def test_only_text_to_video_needs_no_image() -> None:
    assert [paradigm.name for paradigm in BUILT_IN if not paradigm.uses_image] == ["text_to_video"]
