"""What training of an adapter writes, merged into its base by ``convert``, predicts what it predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from helpers.base_weights import write_base
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.load import load_stages

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=LATENT_SHAPE[0],
    text_dim=TEXT_DIM, text_length=TEXT_LENGTH, conditioning="text_to_video",
)  # fmt: skip


def velocity(root: Path) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    noisy, image = (torch.randn(1, *shape, generator=generator) for shape in (LATENT_SHAPE, (LATENT_SHAPE[0], 1, 4, 4)))
    text = torch.randn(1, TEXT_LENGTH, TEXT_DIM, generator=generator)
    folder, device = find_checkpoint(root), resolve_device("cpu")
    assert folder is not None
    with single_process(device) as groups, torch.no_grad():
        (model,) = load_stages(folder, groups, device, ParallelArguments())
        return predict_velocity(model, noisy, torch.tensor([600.0]), text, image, {"cutoff_ratio": torch.tensor([0.1])})


def test_a_trained_adapter_merges_to_the_model_that_it_was(train: Callable[..., int], tmp_path: Path) -> None:
    """A FlashI2V beside a text-to-video base: phi and the rest were trained whole, in bf16."""
    write_base(tmp_path / "base", CONFIG)
    flags = ("--lora-rank", 2, "--lora-alpha", 6, "--lora-targets", "all", "--lr", 0.05)
    run = tmp_path / "run"
    assert train("--save", run, "--load-weights", f"megatron:{tmp_path / 'base'}", *flags, "--bf16") == 0
    merge = ("--adapter", run, "--merge", "--dtype", "float32", "--to", "megatron", tmp_path / "full")
    assert main(["convert", "--from", "megatron", str(tmp_path / "base"), *map(str, merge)]) == 0
    expected = velocity(run)
    torch.testing.assert_close(velocity(tmp_path / "full"), expected, rtol=1e-4, atol=1e-5)
    write_base(tmp_path / "plain", dataclasses.replace(CONFIG, conditioning="flashi2v"))
    assert (velocity(tmp_path / "plain") - expected).abs().max() > 1e-2
