"""An exported transformer computes in diffusers what ours computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers.checkpoints import checkpoint, save_checkpoint
from helpers.paradigms import stored_inputs

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.model_state import load_weights
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.convert import convert
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.weight_shards import whole_weights
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

CONFIG = ModelConfig(
    num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=3, freq_dim=32, text_dim=24,
    text_length=7,
)  # fmt: skip
INPUT_CHANNELS = {"text_to_video": 16, "repeat_concat": 32, "zero_pad_concat": 32, "inpainting": 36, "wan_i2v": 36}


@pytest.mark.parametrize("conditioning", INPUT_CHANNELS)
def test_forward_of_the_export(tmp_path: Path, conditioning: str) -> None:
    """diffusers' model is fed what our paradigm makes of the latents and the image."""
    config = dataclasses.replace(CONFIG, conditioning=conditioning, image_dim=10, image_rows=5)
    if conditioning == "wan_i2v":  # diffusers takes the last 512 rows for the text's
        config = dataclasses.replace(config, text_length=512)
    generator = torch.Generator().manual_seed(0)
    pieces = [
        TensorPiece.whole(
            f"model.{name}", torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 1)
        )
        for name, shape in parameter_shapes(config).items()
    ]
    checkpoint = save_checkpoint(tmp_path / "run", 1, pieces=pieces, model_config=config, state={})
    convert(("megatron", tmp_path / "run"), ("diffusers", tmp_path / "export"))
    exported, info = WanTransformer3DModel.from_pretrained(
        tmp_path / "export" / "transformer", output_loading_info=True
    )
    assert not any(info.values()), info
    assert exported.config.in_channels == INPUT_CHANNELS[conditioning]

    latents_BCTHW = torch.randn(2, 16, 3, 4, 6, generator=generator)
    timestep_B = torch.tensor([500.0, 37.0])
    text_BLD = torch.randn(2, config.text_length, 24, generator=generator)
    image_BC1HW, noise_BC1HW = torch.randn(2, 2, 16, 1, 4, 6, generator=generator)
    extras = {"image_noise_level": torch.tensor([0.1, 0.5]), "image_noise": noise_BC1HW,
              **stored_inputs(config, latents_BCTHW)}
    device = resolve_device("cpu")
    with single_process(device) as groups, torch.no_grad():
        model = build_model(config, groups, device)
        names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert names == parameter_shapes(config)
        load_weights(checkpoint, whole_weights(model.named_parameters(), ShardGrid()))
        ours = predict_velocity(model, latents_BCTHW, timestep_B, text_BLD, image_BC1HW, extras)
        fed = model.conditioning(latents_BCTHW, image_BC1HW, extras)
        theirs = exported(fed.latents_BCTHW, timestep_B, text_BLD, fed.image_rows_BRX, return_dict=False)[0]
    assert theirs.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_check_runs_what_was_written_of_a_bf16_run(tmp_path: Path) -> None:
    """Its weights in bf16, not their fp32 masters, of which the written ones are roundings."""
    checkpoint(tmp_path / "run", bf16=True)
    flags = ["--from", "megatron", str(tmp_path / "run"), "--to", "wan", str(tmp_path / "out"), "--verify"]
    assert main(["convert", *flags]) == 0
