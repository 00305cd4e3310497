"""What a test of ``flashi2v sample`` needs: a checkpoint, encoders and pictures, all small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.checkpoints import save_checkpoint
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae
from megatron_flashi2v.checkpoint.model_state import model_pieces
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=4, freq_dim=16,
    text_dim=16, text_length=8,
)


def make_sampling_models(folder: Path, config: ModelConfig = CONFIG, *, pictures: int = 3) -> Path:
    """A checkpoint whose weights are nowhere zero, encoders, and ``image0.png``, ``image1.png``, ..."""
    make_tiny_vae(folder / "vae")
    make_tiny_text_encoder(folder / "text_encoder")
    make_tiny_tokenizer(folder / "tokenizer")
    device = resolve_device("cpu")
    with single_process(device) as groups:
        model = build_model(config, groups, device)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        save_checkpoint(
            folder / "checkpoints", 1, pieces=model_pieces(model.named_parameters(), ShardGrid()), model_config=config,
            state={"iteration": 1, "data": {"frames": 5, "height": 16, "width": 24, "fps": 8.0}},
        )
    for number in range(pictures):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{number}.png")
    return folder


def sample_words(models: Path, output: Path, *flags: object) -> list[str]:
    """Arguments of ``flashi2v``, without image and prompt."""
    return list(map(str, [
        "sample", "--load", models / "checkpoints", "--vae", models / "vae", "--text-encoder", models / "text_encoder",
        "--tokenizer", models / "tokenizer", "--num-steps", 2, "--device", "cpu", "--output", output, *flags,
    ]))  # fmt: skip
