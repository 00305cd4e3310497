"""Samples of Wan's image-to-video models: diffusers' WanImageToVideoPipeline ends where ours end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from helpers.releases import CONFIG, release, sampled, train
from PIL import Image

from megatron_flashi2v import FlashI2VPipeline
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.sampling.noise import sample_noise

WAN_I2V = dataclasses.replace(CONFIG, conditioning="wan_i2v", text_length=512)
SIZE = {"num_frames": 5, "height": 16, "width": 32}
CALL = {**SIZE, "prompt": "a dog runs", "negative_prompt": "", "num_inference_steps": 3, "guidance_scale": 3.0,
        "output_type": "latent"}  # fmt: skip


@pytest.fixture(scope="module", params=[12, 0], ids=["with CLIP rows", "without"])
def wan_i2v(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """A release; its run and an image of a video's size lie beside it."""
    root = tmp_path_factory.mktemp("wan_i2v")
    train(root / "run", dataclasses.replace(WAN_I2V, image_dim=request.param))
    Image.open(parts / "image.png").resize((32, 16)).save(root / "image.png")
    return release(root, parts, *(("--image-encoder", str(parts / "image_encoder")) if request.param else ()))


def test_latents_are_those_of_diffusers_pipeline(wan_i2v: Path, parts: Path, tmp_path: Path) -> None:
    root = wan_i2v.parent
    image = Image.open(root / "image.png")
    has_rows = json.loads((wan_i2v / "image_conditioning" / "config.json").read_text())["image_dim"] > 0
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0)
    rows = {} if has_rows else {"image_encoder": None, "image_processor": None}
    theirs = WanImageToVideoPipeline.from_pretrained(wan_i2v, scheduler=scheduler, **rows)
    noise = sample_noise(7, [0], (4, 3, 4, 8))
    expected = theirs(**CALL, image=image, latents=noise, max_sequence_length=512).frames
    flags = ("--num-frames", "5", "--height", "16", "--width", "32", "--negative-prompt", "", "--solver", "unipc",
             "--image", str(root / "image.png"), "--image-encoder", str(parts / "image_encoder"))
    found = sampled(root / "run", parts, tmp_path, *flags)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # with the release's own image encoder
    torch.testing.assert_close(sampled(wan_i2v, parts, tmp_path, *flags[:-2]), expected, atol=1e-4, rtol=0)
    ours = FlashI2VPipeline.from_pretrained(wan_i2v, **rows)
    ours.scheduler = UniPCMultistepScheduler.from_config(ours.scheduler.config, solver_order=2)
    torch.testing.assert_close(ours(**CALL, image=image, latents=noise).frames, expected, atol=1e-4, rtol=0)
    # The comparison can fail: the image counts, in both of its ways.
    other = Image.new("RGB", (32, 16), (200, 30, 90))
    assert (theirs(**CALL, image=other, latents=noise, max_sequence_length=512).frames - expected).abs().max() > 1e-2
    if has_rows:
        with pytest.raises(ConfigError, match="give max_sequence_length=512"):
            ours(**CALL, image=image, latents=noise, max_sequence_length=8)
        with pytest.raises(ConfigError, match="attends to the rows of an image encoder; give one"):
            FlashI2VPipeline.from_pretrained(wan_i2v, image_encoder=None)(**CALL, image=image)
        with torch.no_grad():
            for parameter in theirs.image_encoder.parameters():
                parameter.mul_(1.3)
        again = theirs(**CALL, image=image, latents=noise, max_sequence_length=512).frames
        assert (again - expected).abs().max() > 1e-2


def test_an_image_encoder_that_is_missing_or_another_is_refused(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", dataclasses.replace(WAN_I2V, image_rows=5))
    command = ["sample", "--load", tmp_path / "run", "--vae", parts / "vae", "--text-encoder", parts / "text_encoder",
               "--tokenizer", parts / "tokenizer", "--image", parts / "image.png", "--prompt", "a dog runs",
               "--output", tmp_path / "a.mp4", "--device", "cpu"]  # fmt: skip
    for flags, words in (
        ((), "--image-encoder must be given"),
        (("--image-encoder", parts / "image_encoder"), "makes 17 rows of width 12, the model takes 5 of 12"),
        (("--image-encoder", parts / "text_encoder"), "model_type is 'umt5'; it must be clip_vision_model"),
        (("--image-encoder", tmp_path / "none"), "does not exist"),
    ):  # fmt: skip
        assert main(list(map(str, [*command, *flags]))) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()


def test_a_release_takes_an_image_encoder_that_fits(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied or named; refused where it is of another width, or where no rows are attended to."""
    flags = ("--image-encoder", str(parts / "image_encoder"))
    train(tmp_path / "run", WAN_I2V)
    named = release(tmp_path, parts, *flags, "--components", "reference")
    index = json.loads((named / "model_index.json").read_text())
    assert set(index["_component_sources"]) == {"vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"}
    assert FlashI2VPipeline.from_pretrained(named).image_processor.size == {"shortest_edge": 8}
    for name, config, words in (
        ("narrow", dataclasses.replace(WAN_I2V, image_dim=9), "its hidden_size is 12, the model's image_dim 9"),
        ("few", dataclasses.replace(WAN_I2V, image_rows=5), "its number of rows is 17, the model's image_rows 5"),
        ("other", CONFIG, "the model (flashi2v) attends to no rows of one; leave out the flag"),
    ):
        train(tmp_path / name / "run", config)
        command = ("convert", "--from", "megatron", str(tmp_path / name / "run"), "--to", "diffusers")
        capsys.readouterr()
        assert main([*command, str(tmp_path / name / "out"), *flags]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / name / "out").exists()
