"""A pair of experts, trained each on its noise levels, ends where diffusers' pipelines of the pair end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from helpers.releases import CONFIG, PARTS, release, sampled, train
from PIL import Image

from megatron_flashi2v import FlashI2VPipeline
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.sampling.noise import sample_noise

STEPS, BOUNDARY = 4, 0.954
"""Of whose timesteps 999, 954, 875 and 700, at shift 7, the second stands on the boundary."""
SCALES = {"guidance_scale": 12.0, "guidance_scale_2": 4.0}
PROMPT = " ".join(["a dog runs"] * 170)
"""As long as the text, or the prompt counted little among rows of zeros."""
CALL = {"num_frames": 5, "height": 16, "width": 32, "prompt": PROMPT, "negative_prompt": "",
        "num_inference_steps": STEPS, "output_type": "latent", **SCALES}  # fmt: skip
FLAGS = ("--num-frames", "5", "--height", "16", "--width", "32", "--negative-prompt", "", "--solver", "unipc",
         "--num-steps", str(STEPS), "--guidance-scale", "12", "--guidance-scale-2", "4",
         "--prompt", PROMPT)  # fmt: skip
NOISE = sample_noise(7, [0], (4, 3, 4, 8))
HALVES = {"high": ("--sigma-min", BOUNDARY), "low": ("--sigma-max", BOUNDARY)}


def make_pair(root: Path, parts: Path, run_command: Callable[..., int], **settings: Any) -> Path:
    """Runs ``high`` and ``low``, each of a few steps from the same weights, the releases of both, and that of the
    pair."""
    config = dataclasses.replace(CONFIG, freq_dim=256, **settings)
    train(root / "start", config)
    model = ("--model", "tiny", "--num-layers", 2, "--hidden-size", 48, "--ffn-hidden-size", 64, "--latent-channels", 4,
             "--num-attention-heads", 3, "--text-dim", 16, "--text-length", config.text_length, "--image-embed-dim",
             config.image_dim, "--conditioning", config.conditioning, "--phi-kernel", "3x3x3", "--phi-order",
             config.phi_order)  # fmt: skip
    data = ("--mock-data", "--num-frames", 5, "--height", 16, "--width", 32, "--vae", parts / "vae", "--device", "cpu")
    for name, levels in HALVES.items():
        assert run_command(*model, *data, *levels, "--load-weights", f"megatron:{root / 'start'}", "--lr", 0.02,
                           "--train-iters", 3, "--save", root / name / "run") == 0  # fmt: skip
        release(root / name, parts)
    command = ("convert", "--from", "megatron", root / "high" / "run", "--low-noise", root / "low" / "run",
               "--to", "diffusers", root / "pair")  # fmt: skip
    flags = (word for name in PARTS for word in (f"--{name.replace('_', '-')}", parts / name))
    assert main(list(map(str, (*command, *flags)))) == 0
    return root


@pytest.mark.parametrize("conditioning", ["text_to_video", "wan_i2v", "flashi2v"])
def test_a_pair_ends_where_diffusers_pipeline_ends(
    conditioning: str, parts: Path, tmp_path: Path, run_command: Callable[..., int]
) -> None:
    text_length = 512 if conditioning == "wan_i2v" else 8
    root = make_pair(tmp_path, parts, run_command, conditioning=conditioning, image_dim=0, text_length=text_length)
    flags, given = list(FLAGS), dict(CALL)
    if conditioning != "text_to_video":
        Image.open(parts / "image.png").resize((32, 16)).save(root / "image.png")
        flags += ["--image", str(root / "image.png")]
        given["image"] = Image.open(root / "image.png")
    ours = FlashI2VPipeline.from_pretrained(root / "pair")
    ours.scheduler = UniPCMultistepScheduler.from_config(ours.scheduler.config, solver_order=2)
    expected = ours(**given, latents=NOISE).frames
    if conditioning != "flashi2v":  # which diffusers does not know
        kind = WanPipeline if conditioning == "text_to_video" else WanImageToVideoPipeline
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0)
        theirs = kind.from_pretrained(root / "pair", scheduler=scheduler)
        assert theirs.config.boundary_ratio == BOUNDARY
        theirs_call = {**given, "latents": NOISE, "max_sequence_length": text_length}
        expected, ours_found = theirs(**theirs_call).frames, expected
        assert [int(step) for step in theirs.scheduler.timesteps] == [999, 954, 875, 700]
        torch.testing.assert_close(ours_found, expected, atol=1e-4, rtol=0)
        # The comparison can fail: each expert, the boundary and each scale count.
        for change in ({"guidance_scale": 4.0}, {"guidance_scale_2": 12.0}):
            assert (theirs(**theirs_call | change).frames - expected).abs().max() > 1e-3
        for ratio in (0.955, 0.0, 1.0):
            theirs.register_to_config(boundary_ratio=ratio)
            assert (theirs(**theirs_call).frames - expected).abs().max() > 1e-3
    else:
        ours.save_pretrained(tmp_path / "again")
        again = FlashI2VPipeline.from_pretrained(tmp_path / "again", scheduler=ours.scheduler)
        torch.testing.assert_close(again(**given, latents=NOISE).frames, expected, atol=1e-4, rtol=0)
        ours.image_conditioning_2 = None  # the second expert's own counts
        assert (ours(**given, latents=NOISE).frames - expected).abs().max() > 1e-3
        ours.transformer_2 = None
        with pytest.raises(ConfigError, match="a pair of experts has both"):
            ours(**given | {"guidance_scale_2": None})
        with pytest.raises(ConfigError, match="there is one model; leave it out"):
            ours(**given)
    assert expected.std() > 0.3
    low = ("--low-noise", str(root / "low" / "run"))
    runs = sampled(root / "high" / "run", parts, tmp_path, *flags, *low)  # the boundary is that of their training
    torch.testing.assert_close(runs, expected, atol=1e-4, rtol=0)
    for load, more in (
        (root / "pair", ()),
        (root / "high" / "release", (*low, "--boundary-ratio", str(BOUNDARY))),
        (root / "pair" / "transformer", ("--low-noise", str(root / "pair" / "transformer_2"), "--batched-guidance")),
    ):  # fmt: skip
        torch.testing.assert_close(sampled(load, parts, tmp_path, *flags, *more), expected, atol=1e-4, rtol=0)
