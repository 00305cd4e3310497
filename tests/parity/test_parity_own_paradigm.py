"""A paradigm of another package, one class and one line that registers it, from training to a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.layouts import metrics, weights
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae
from helpers.train_command import LATENT_SHAPE
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_flashi2v import FlashI2VPipeline
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.conditioning import build
from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras, ImageConditioning, OwnTensor
from megatron_flashi2v.config.model import ModelConfig

Train = Callable[..., int]
PARTS = ("vae", "text_encoder", "tokenizer")


class GainedImage(ImageConditioning):
    """``x_in = x_t + gain z_0`` in every frame, with one learned gain for each channel."""

    name = "gained_image"
    latent_modules = ("gain",)

    def __init__(self, config: ModelConfig, highpass: object = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.empty(config.latent_channels, 1, 1, 1))

    @classmethod
    def own_tensors(cls, config: ModelConfig) -> dict[str, OwnTensor]:
        return {"gain": OwnTensor(shape=(config.latent_channels, 1, 1, 1), starts_at_zero=True)}

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        return ConditionedInput(noisy_BCTHW.float() + self.gain * image_latents_BC1HW.float())


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_registered", dict(build._registered))  # other tests know nothing of it
    build.register(GainedImage)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with strides 4 and 4, a text encoder of the data's width, and an image."""
    folder = tmp_path_factory.mktemp("parts")
    make_tiny_vae(folder / "vae", temporal=(True, True))
    make_tiny_text_encoder(folder / "text_encoder", text_dim=8)
    make_tiny_tokenizer(folder / "tokenizer")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def command(name: str, *words: object, **flags: object) -> int:
    spelt = [str(word) for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value)]
    return main([name, *map(str, words), *spelt])


def test_trains_resumes_exports_and_samples(train: Train, parts: Path, tmp_path: Path) -> None:
    straight, halves, encoders = tmp_path / "straight", tmp_path / "halves", {name: parts / name for name in PARTS}
    flags = ("--conditioning", "gained_image", "--train-iters", 2, "--lr", 0.05)
    assert train(*flags, "--save", straight) == 0
    assert train(*flags, "--save", halves, "--exit-interval", 1) == 0
    assert train(*flags, "--save", halves, "--load", halves) == 0
    assert [row["loss"] for row in metrics(halves)] == [row["loss"] for row in metrics(straight)]
    trained = weights(straight)
    assert all(torch.equal(tensor, trained[key]) for key, tensor in weights(halves).items())
    assert trained["model.conditioning.gain"].abs().min() > 0.01  # of zeros

    export, back, latents = tmp_path / "export", tmp_path / "back", tmp_path / "latents.safetensors"
    assert command("convert", "--verify", "--from", "megatron", straight, "--to", "diffusers", export, **encoders) == 0
    stored = load_file(export / "image_conditioning" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(stored.pop("gained_image.gain"), trained["model.conditioning.gain"]) and not stored
    assert "Image-to-video model (gained_image)" in (export / "README.md").read_text()
    assert command("convert", "--from", "diffusers", export, "--to", "megatron", back) == 0

    size = {"num_frames": 5, "height": 16, "width": 16}
    assert command("sample", load=back, image=parts / "image.png", prompt="a dog", output=tmp_path / "a.mp4", seed=7,
                   latents=latents, device="cpu", num_steps=2, guidance_scale=3.0, **size, **encoders) == 0
    pipeline = FlashI2VPipeline.from_pretrained(export)
    settings = {"prompt": "a dog", "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", **size}
    picture, seed = Image.open(parts / "image.png"), torch.Generator().manual_seed(7)
    found = pipeline(image=picture, **settings, generator=seed).frames
    assert found.shape == (1, *LATENT_SHAPE)
    torch.testing.assert_close(found, load_file(latents)["latents_BCTHW"], atol=1e-4, rtol=0)
    with torch.no_grad():  # the gain does something
        pipeline.image_conditioning.get_parameter("gained_image.gain").zero_()
    other = pipeline(image=picture, **settings, generator=seed).frames
    assert (other - found).abs().max() > 1e-2


def test_starts_from_and_gives_weights_to_the_built_in_ones(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, own = tmp_path / "base", tmp_path / "own"
    assert train("--conditioning", "text_to_video", "--train-iters", 1, "--save", base) == 0
    start = ("--load-weights", f"megatron:{base}", "--train-iters", 1)
    assert train("--conditioning", "gained_image", *start, "--save", own) == 0
    assert "1 tensors are missing and start as initialised (conditioning.gain)" in capsys.readouterr().err
    losses = []
    for name, *more in (("text_to_video", *start), ("inpainting", "--load-weights", f"megatron:{own}")):
        assert train("--conditioning", name, *more, "--train-iters", 1, "--save", tmp_path / name) == 0
        losses.append(metrics(tmp_path / name)[0]["loss"])
    assert "1 are unexpected and left out (conditioning.gain)" in capsys.readouterr().err
    assert metrics(own)[0]["loss"] == pytest.approx(losses[0], rel=1e-6)


def test_a_dry_run_counts_its_parameters(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--conditioning", "gained_image", "--dry-run") == 0
    assert "gained_image_part: 4\n" in capsys.readouterr().out


def test_a_misspelt_name_has_a_suggestion(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ((), ("--dry-run",)):
        assert train("--conditioning", "gained_imgae", *flags) == 2
        message = capsys.readouterr().err
        assert "conditioning is 'gained_imgae'; choose one of flashi2v, repeat_concat" in message
        assert "did you mean gained_image?" in message
