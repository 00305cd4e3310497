"""Solvers of a release: diffusers' WanPipeline on the same weights is on our grid, and ends where ours ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from helpers.releases import CONFIG, release, sampled, train
from PIL import Image

from megatron_flashi2v import FlashI2VPipeline
from megatron_flashi2v.flow.sigmas import inference_sigmas
from megatron_flashi2v.sampling.noise import sample_noise

SIZE = {"num_frames": 5, "height": 16, "width": 32}  # WanPipeline takes multiples of 16
FLAGS = ("--num-frames", "5", "--height", "16", "--width", "32", "--negative-prompt", "")
CALL = {**SIZE, "prompt": "a dog runs", "negative_prompt": "", "num_inference_steps": 3, "guidance_scale": 3.0,
        "output_type": "latent"}  # fmt: skip
KINDS = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}


@pytest.fixture(scope="module")
def text_to_video(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    root = tmp_path_factory.mktemp("text")
    train(root / "run", dataclasses.replace(CONFIG, conditioning="text_to_video"))
    return release(root, parts)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_a_solver_ends_where_diffusers_pipeline_ends(
    name: str, text_to_video: Path, parts: Path, tmp_path: Path
) -> None:
    scheduler = KINDS[name](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0)
    theirs = WanPipeline.from_pretrained(text_to_video, scheduler=scheduler)
    noise = sample_noise(7, [0], (4, 3, 4, 8))
    expected = theirs(**CALL, latents=noise, max_sequence_length=8).frames
    found = sampled(text_to_video.parent / "run", parts, tmp_path, *FLAGS, "--solver", name)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    ours = FlashI2VPipeline.from_pretrained(text_to_video)
    ours.scheduler = KINDS[name].from_config(ours.scheduler.config)
    assert ours.scheduler.config.solver_order == 2
    torch.testing.assert_close(ours(**CALL, latents=noise).frames, expected, atol=1e-4, rtol=0)
    # The noise of a seed is that of `flashi2v sample`.
    keyed = ours(**CALL, generator=torch.Generator().manual_seed(7)).frames
    torch.testing.assert_close(keyed, expected, atol=1e-4, rtol=0)
    euler = sampled(text_to_video.parent / "run", parts, tmp_path, *FLAGS)
    assert (euler - expected).abs().max() > 1e-2


def test_a_releases_scheduler_puts_diffusers_on_our_grid(text_to_video: Path, released: Path) -> None:
    for folder in (text_to_video, released):
        scheduler = WanPipeline.from_pretrained(folder).scheduler
        assert scheduler.config.use_flow_sigmas and scheduler.config.flow_shift == 7.0
        for steps in (3, 8, 50):
            scheduler.set_timesteps(steps)
            torch.testing.assert_close(scheduler.sigmas, inference_sigmas(steps, 7.0), atol=2e-3, rtol=0)


def test_diffusers_takes_eulers_steps_with_it(text_to_video: Path) -> None:
    """Within what whole timesteps and the grid's thousandth cost."""
    noise = sample_noise(7, [0], (4, 3, 4, 8))
    theirs = WanPipeline.from_pretrained(text_to_video)(**CALL, latents=noise, max_sequence_length=8).frames
    ours = FlashI2VPipeline.from_pretrained(text_to_video)(**CALL, latents=noise).frames
    assert (theirs - ours).abs().max() < 0.05 * ours.abs().max()


def test_the_release_itself_takes_exact_steps(released: Path) -> None:
    scheduler = FlashI2VPipeline.from_pretrained(released).scheduler
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.shift == 7.0
    second_order = DPMSolverMultistepScheduler.from_config({**scheduler.config, "solver_order": 2})
    assert FlashI2VPipeline.from_pretrained(released, scheduler=second_order).scheduler is second_order


def test_sample_takes_a_release(released: Path, parts: Path, tmp_path: Path) -> None:
    """Its encoders too, found in it."""
    image = ("--image", str(parts / "image.png"))
    expected = sampled(released.parent / "run", parts, tmp_path, *image)
    assert torch.equal(sampled(released, released, tmp_path, *image), expected)
    whole = [word for name in ("vae", "text-encoder", "tokenizer") for word in (f"--{name}", str(released))]
    assert torch.equal(sampled(released, parts, tmp_path, *image, *whole), expected)


def test_a_release_holds_one_set_of_weights(
    released: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.open(parts / "image.png").filename
    with pytest.raises(AssertionError):
        sampled(released, parts, tmp_path, "--image", image, "--weights", "ema")
    assert "is a release, which holds one set of weights; leave out --weights ema" in capsys.readouterr().err
