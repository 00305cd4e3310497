"""The pipeline around velocities of known solution, with a VAE and a text encoder that can be worked out by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.sampling.noise import sample_noise
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline, latent_shape_of, to_frames
from megatron_flashi2v.sampling.prompts import DEFAULT_NEGATIVE_PROMPT

CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=1,
    latent_channels=3,
    text_dim=2,
    text_length=6,
)
SIZE = {"num_frames": 5, "height": 16, "width": 24}
LATENT_SHAPE = (3, 3, 4, 6)


class BlockVAE:
    """Latents are twice the mean colour of 4x4 pixels of every second frame; decoding repeats them."""

    latent_channels, temporal_stride, spatial_stride = 3, 2, 4

    def latent_shape(self, frames, height, width):
        return (3, 1 + (frames - 1) // 2, height // 4, width // 4)

    def encode(self, video_BCTHW):
        return 2.0 * torch.nn.functional.avg_pool3d(video_BCTHW[:, :, ::2], (1, 4, 4))

    def decode(self, latents_BCTHW):
        frames = latents_BCTHW.repeat_interleave(2, dim=2)[:, :, 1:] / 2.0
        return frames.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)


class LetterEncoder:
    """One row (letter's code, 1) per letter; remembers the prompts."""

    text_dim = 2

    def __init__(self):
        self.prompts = []

    def encode(self, prompts):
        self.prompts += prompts
        return [
            torch.tensor([[float(ord(letter)), 1.0] for letter in prompt[:6]]).reshape(-1, 2)
            for prompt in prompts
        ]


def towards_image(latents, timestep, text, image_latents, extras):
    """The straight field whose end point is the image in every latent frame: ``(state - image) / sigma``."""
    return (latents - image_latents) / (timestep / 1000).view(-1, 1, 1, 1, 1)


def make(velocity=towards_image, config=CONFIG, **arguments):
    return ImageToVideoPipeline(
        velocity=velocity,
        vae=BlockVAE(),
        text_encoder=LetterEncoder(),
        model_config=config,
        device=torch.device("cpu"),
        **arguments,
    )


def blocks(seed):
    """A uint8 picture [3, 16, 24] of flat 4x4 blocks, which the VAE above keeps."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 6), dtype=np.uint8)
    return torch.from_numpy(colours.repeat(4, axis=1).repeat(4, axis=2))


def test_flow_to_the_image_gives_the_image_in_every_frame():
    """Through resize, range, VAE, solver, decode and rounding, nothing is lost."""
    video = make()([blocks(0), blocks(1)], ["a", "b"], num_steps=7, guidance_scale=1.0, **SIZE)
    assert video.frames_BTHWC.shape == (2, 5, 16, 24, 3) and video.frames_BTHWC.dtype == np.uint8
    assert video.latents_BCTHW.shape == (2, *LATENT_SHAPE) and video.latents_BCTHW.dtype == torch.float32
    for sample in (0, 1):
        picture = blocks(sample).permute(1, 2, 0).numpy()
        assert np.array_equal(video.images_BHWC[sample], picture)
        for frame in video.frames_BTHWC[sample]:
            assert np.array_equal(frame, picture)


def test_images_may_be_pil_of_any_size_and_mode():
    picture = Image.fromarray(blocks(0).permute(1, 2, 0).numpy())
    same = make()(picture, "a", num_steps=2, **SIZE)
    assert np.array_equal(same.images_BHWC[0], np.asarray(picture))
    grey = make()(Image.new("L", (100, 30), 77), "a", num_steps=2, **SIZE)
    assert (grey.frames_BTHWC == 77).all()


def test_every_pass_sees_image_and_ratio_and_only_the_text_differs():
    calls = []

    def velocity(*arguments):
        calls.append(arguments)
        return torch.zeros_like(arguments[0])

    pipeline = make(velocity)
    pipeline(blocks(0), "hop", negative_prompt="no", num_steps=2, cutoff_ratio=0.3, shift=7.0, **SIZE)
    assert len(calls) == 4
    expected_latents = BlockVAE().encode(2 * (blocks(0) / 255.0)[None, :, None] - 1)
    for latents, timestep, text, image_latents, extras in calls:
        assert latents.shape == (1, *LATENT_SHAPE) and timestep.shape == (1,) and text.shape == (1, 6, 2)
        torch.testing.assert_close(image_latents, expected_latents)
        assert list(extras) == ["cutoff_ratio"] and torch.equal(extras["cutoff_ratio"], torch.tensor([0.3]))
    first, second = calls[0][2][0], calls[1][2][0]
    assert first[:3, 0].tolist() == [ord("h"), ord("o"), ord("p")] and not first[3:].any()
    assert second[:2, 0].tolist() == [ord("n"), ord("o")] and not second[2:].any()
    # shift 7 moves the middle of [1, 0] to 7 / 8
    assert [call[1].item() for call in calls] == [1000.0, 1000.0, 875.0, 875.0]


@pytest.mark.parametrize(
    ("given", "encoded"), [(None, DEFAULT_NEGATIVE_PROMPT), ("", ""), ("Very DARK", "very dark")]
)
def test_negative_prompt(given, encoded):
    pipeline = make()
    pipeline(blocks(0), "A Dog", negative_prompt=given, num_steps=1, **SIZE)
    assert pipeline.text_encoder.prompts == ["a dog", encoded]


def test_negative_prompt_of_the_model():
    pipeline = make(negative_prompt="Grey")
    for given in (None, "no"):
        pipeline(blocks(0), "a", negative_prompt=given, num_steps=1, **SIZE)
    assert pipeline.text_encoder.prompts == ["a", "grey", "a", "no"]


def test_prompts_are_cleaned_as_the_model_was_trained():
    pipeline = make(config=dataclasses.replace(CONFIG, text_cleaning="light"))
    pipeline(blocks(0), "  A   Dog ", negative_prompt="X", num_steps=1, **SIZE)
    assert pipeline.text_encoder.prompts == ["A Dog", "X"]


def test_no_guidance_encodes_no_negative_prompt():
    pipeline = make()
    pipeline(blocks(0), "a", guidance_scale=1.0, num_steps=1, **SIZE)
    assert pipeline.text_encoder.prompts == ["a"]


def test_sequential_and_batched_guidance_agree():
    def velocity(latents, timestep, text, image_latents, extras):
        return latents * 0.1 + text.sum(dim=(1, 2)).view(-1, 1, 1, 1, 1) / 100 + image_latents

    arguments = {"negative_prompt": "no", "num_steps": 3, **SIZE}
    images, prompts = [blocks(0), blocks(1)], ["hop", "stand"]
    sequential = make(velocity)(images, prompts, **arguments)
    batched = make(velocity, batched_guidance=True)(images, prompts, **arguments)
    torch.testing.assert_close(sequential.latents_BCTHW, batched.latents_BCTHW)


def test_sample_does_not_depend_on_its_batch():
    together = make()([blocks(0), blocks(1)], ["a", "b"], num_steps=1, seed=3, guidance_scale=1, **SIZE)
    second = make()(blocks(1), "b", num_steps=1, seed=3, guidance_scale=1, first_index=1, **SIZE)
    assert torch.equal(together.latents_BCTHW[1:], second.latents_BCTHW)
    seen = []
    make(lambda latents, *rest: seen.append(latents) or latents)(blocks(0), "a", num_steps=1, seed=3, **SIZE)
    assert torch.equal(seen[0], sample_noise(3, [0], LATENT_SHAPE))


def test_noise_on_the_image_does_not_depend_on_the_batch_and_follows_the_settings():
    config = dataclasses.replace(CONFIG, conditioning="repeat_concat")

    def extras_of(*arguments, **settings):
        seen = []
        pipeline = make(lambda latents, *rest: seen.append(rest[-1]) or latents, config=config)
        pipeline(*arguments, num_steps=1, guidance_scale=1, **settings, **SIZE)
        return seen[0]

    together = extras_of([blocks(0), blocks(1)], ["a", "b"], seed=3, image_noise=0.07)
    second = extras_of(blocks(1), "b", seed=3, first_index=1)
    assert together["image_noise"].shape == (2, 3, 1, 4, 6) and together["image_noise_level"].tolist() == [
        pytest.approx(0.07)
    ] * 2
    assert torch.equal(together["image_noise"][1:], second["image_noise"])
    assert second["image_noise_level"].item() == pytest.approx(0.02)
    assert not torch.equal(*together["image_noise"])
    assert not torch.equal(extras_of(blocks(1), "b", seed=4, first_index=1)["image_noise"], second["image_noise"])


def test_one_image_serves_all_prompts_and_one_prompt_all_images():
    assert len(make()(blocks(0), ["a", "b", "c"], num_steps=1, **SIZE).frames_BTHWC) == 3
    assert len(make()([blocks(0), blocks(1)], "a", num_steps=1, **SIZE).frames_BTHWC) == 2
    with pytest.raises(ConfigError, match="2 images and 3 prompts"):
        make()([blocks(0), blocks(1)], ["a", "b", "c"], num_steps=1, **SIZE)


def test_only_a_text_to_video_model_goes_without_an_image():
    with pytest.raises(ConfigError, match="no image"):
        make()(None, "a", num_steps=1, **SIZE)
    pipeline = make(
        lambda latents, *rest: latents, config=dataclasses.replace(CONFIG, conditioning="text_to_video")
    )
    video = pipeline(None, ["a", "b"], num_steps=1, **SIZE)
    assert video.images_BHWC is None and len(video.frames_BTHWC) == 2


def test_pixels_are_clamped_and_rounded_half_up():
    levels = torch.tensor([-3.0, -1.0, -1.0 + 0.6 * 2 / 255, 0.0, 1.0 - 0.4 * 2 / 255, 1.0, 2.0])
    frames = to_frames(levels.view(1, 1, 1, 1, -1).expand(1, 3, 1, 1, -1))
    assert frames.shape == (1, 1, 1, 7, 3)
    assert frames[0, 0, 0, :, 0].tolist() == [0, 0, 1, 128, 255, 255, 255]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_frames": 6}, r"num_frames is 6; .*1 plus a multiple of 2, for instance 5 or 7"),
        ({"num_frames": 0}, r"num_frames is 0; .*for instance 1$"),
        ({"height": 20}, r"height is 20; .*a multiple of 8, for instance 16 or 24"),
        ({"width": 4}, r"width is 4; .*a multiple of 8, for instance 8$"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest(size, message):
    with pytest.raises(ConfigError, match=message):
        make()(blocks(0), "a", num_steps=1, **{**SIZE, **size})
    assert latent_shape_of(BlockVAE(), CONFIG, **SIZE) == LATENT_SHAPE


def test_patches_over_time_ask_for_whole_patches():
    config = dataclasses.replace(CONFIG, patch_size=(2, 2, 2))
    assert latent_shape_of(BlockVAE(), config, 3, 16, 24) == (3, 2, 4, 6)
    with pytest.raises(ConfigError, match="for instance 3 or 7"):
        latent_shape_of(BlockVAE(), config, 5, 16, 24)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_steps": 0},
        {"guidance_scale": float("nan")},
        {"guidance_scale": -1.0},
        {"shift": 0.0},
        {"cutoff_ratio": 1.5},
        {"cutoff_ratio": float("nan")},
        {"image_noise": -0.1},
        {"image_noise": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name} is"):
        make()(blocks(0), "a", **{"num_steps": 1, **setting}, **SIZE)


@pytest.mark.parametrize(("field", "message"), [("latent_channels", "channels"), ("text_dim", "width 2")])
def test_encoders_of_another_width_are_refused(field, message):
    with pytest.raises(ConfigError, match=message):
        make(config=dataclasses.replace(CONFIG, **{field: 5}))
