"""``flashi2v sample`` on a divided model makes the video that one process makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import save_checkpoint
from helpers.ranks import run_ranks
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae
from PIL import Image
from safetensors.torch import load_file

from megatron_flashi2v.checkpoint.model_state import model_pieces
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

CONFIG = ModelConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4, latent_channels=4, freq_dim=16,
    text_dim=16, text_length=8,
)
LAYOUTS = {
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "tp2-sp": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2", "--pipeline-layer-split", "2,1"]),
    "cp2-ulysses": (2, ["--context-parallel-size", "2"]),
    "cp3-ring": (3, ["--context-parallel-size", "3", "--context-parallel-algo", "ring"]),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints whose weights are nowhere zero, of a model and of a pair's second expert, encoders and an image."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_vae(folder / "vae")
    make_tiny_text_encoder(folder / "text_encoder")
    make_tiny_tokenizer(folder / "tokenizer")
    device = resolve_device("cpu")
    with single_process(device) as groups:
        model = build_model(CONFIG, groups, device)
        for seed, name in enumerate(("checkpoints", "second")):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            save_checkpoint(
                folder / name, 1, pieces=model_pieces(model.named_parameters(), ShardGrid()), model_config=CONFIG,
                state={"iteration": 1, "data": {"frames": 5, "height": 16, "width": 24, "fps": 8.0}},
            )
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def arguments(models: Path, output: Path, *flags: str) -> list[str]:
    return list(map(str, [
        "sample", "--load", models / "checkpoints", "--vae", models / "vae", "--text-encoder", models / "text_encoder",
        "--tokenizer", models / "tokenizer", "--image", models / "image.png", "--prompt", "a dog runs",
        "--num-steps", 3, "--device", "cpu", "--output", output, "--latents", output.with_suffix(".safetensors"),
        *flags,
    ]))  # fmt: skip


def sample(rank: int, argv: list[str]) -> None:
    assert main(argv) == 0


@pytest.fixture(scope="module")
def expected(models: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    output = tmp_path_factory.mktemp("one") / "a.mp4"
    run_ranks(sample, 1, models, arguments(models, output))
    return load_file(output.with_suffix(".safetensors"))["latents_BCTHW"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_divided_model_samples_the_same_video(
    models: Path, expected: torch.Tensor, tmp_path: Path, name: str
) -> None:
    processes, flags = LAYOUTS[name]
    run_ranks(sample, processes, models, arguments(models, tmp_path / "a.mp4", *flags))
    found = load_file(tmp_path / "a.safetensors")["latents_BCTHW"]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png", "a.safetensors"]


def test_a_pair_of_experts_on_a_layout(models: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """The second without guidance, where guidance's two passes are on different ranks."""
    pair = ("--low-noise", str(models / "second"), "--boundary-ratio", "0.9", "--guidance-scale-2", "1")
    run_ranks(sample, 1, models, arguments(models, tmp_path / "a.mp4", *pair))
    layout = ("--tensor-model-parallel-size", "2", "--guidance-parallel-size", "2")
    run_ranks(sample, 4, models, arguments(models, tmp_path / "b.mp4", *pair, *layout))
    one, four = (load_file(tmp_path / f"{name}.safetensors")["latents_BCTHW"] for name in "ab")
    assert (one - expected).abs().max() > 0.1
    assert (four - one).abs().max() <= 1e-5 * one.abs().max()


def test_more_processes_than_the_layout_takes_are_refused(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "megatron_flashi2v", *arguments(models, tmp_path / "a.mp4")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0
    assert "2 processes were started, but the layout takes 1" in done.stderr and not list(tmp_path.iterdir())
