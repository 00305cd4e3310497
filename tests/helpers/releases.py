"""Releases of tiny models with random weights, and the models around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.checkpoints import save_checkpoint
from helpers.tiny_models import make_tiny_image_encoder, make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.model import ModelConfig

CONFIG = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=3, latent_channels=4, freq_dim=16,
    text_dim=16, text_length=8, phi_kernel_size=(3, 3, 3), phi_order="repeat_then_conv", mask_channels=2,
    image_dim=12, image_rows=17,
)  # fmt: skip
PARTS = ("vae", "text_encoder", "tokenizer")
DATA = {"samples": 12, "fingerprint": "abc", "frames": 5, "height": 16, "width": 24, "fps": 8.0}
STATE = {
    "version": "0.1.0", "iteration": 30, "consumed_samples": 120, "seed": 5, "data": DATA, "commit": "0123abcd",
    "config": {"load_weights": "diffusers:/home/someone/Wan"},
    "layout": {"processes": 4, "tensor": 2, "pipeline": 2, "context": 1, "precision": "fp32"},
}  # fmt: skip


def make_parts(folder: Path) -> Path:
    """Encoders (the VAE's strides are 2 and 4) and an image."""
    make_tiny_vae(folder / "vae")
    make_tiny_text_encoder(folder / "text_encoder")
    make_tiny_tokenizer(folder / "tokenizer")
    make_tiny_image_encoder(folder / "image_encoder")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def train(root: Path, config: ModelConfig) -> None:
    """A checkpoint of random weights, with what a run records."""
    generator = torch.Generator().manual_seed(0)
    pieces = [
        TensorPiece.whole(f"model.{name}", torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 0.5))
        for name, shape in parameter_shapes(config).items()
    ]
    save_checkpoint(root, 30, pieces=pieces, model_config=config, state=STATE)


def image_encoder(parts: Path) -> dict[str, Any]:
    """The image encoder's components of a pipeline, for a release that does not hold them."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    folder = parts / "image_encoder"
    return {
        "image_encoder": CLIPVisionModel.from_pretrained(folder),
        "image_processor": CLIPImageProcessorPil.from_pretrained(folder),
    }


def release(root: Path, parts: Path, *flags: str) -> Path:
    """The release folder of ``root/run``."""
    folder = root / "release"
    arguments = [word for name in PARTS for word in (f"--{name.replace('_', '-')}", str(parts / name))]
    command = ["convert", "--from", "megatron", str(root / "run"), "--to", "diffusers", str(folder)]
    assert main([*command, *arguments, *flags]) == 0
    return folder


def sampled(run: Path, parts: Path, output: Path, *flags: str) -> torch.Tensor:
    """The final latents of ``flashi2v sample`` with seed 7, three steps and guidance 3."""
    written = output / "latents.safetensors"
    values = {"load": run, "prompt": "a dog runs", "output": output / "a.mp4", "latents": written, "device": "cpu",
              "seed": 7, "num-steps": 3, "guidance-scale": 3.0,
              **{name.replace("_", "-"): parts / name for name in PARTS}}  # fmt: skip
    arguments = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert main(["sample", *arguments, *flags]) == 0
    (latents,) = load_file(written).values()
    return latents
