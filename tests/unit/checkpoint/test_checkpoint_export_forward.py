"""An exported transformer computes in diffusers what ours computes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from megatron_flashi2v.checkpoint.checkpoint import save_checkpoint
from megatron_flashi2v.checkpoint.convert import convert
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.state import ShardGrid, load_model
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.transformer import predict_velocity
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.load import build_model, single_process

CONFIG = ModelConfig(
    num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=3, freq_dim=32, text_dim=24,
    text_length=7, conditioning="text_to_video",
)  # fmt: skip


def test_forward_of_the_export(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pieces = [
        TensorPiece.whole(
            f"model.{name}", torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 1)
        )
        for name, shape in parameter_shapes(CONFIG).items()
    ]
    checkpoint = save_checkpoint(tmp_path / "run", 1, pieces=pieces, model_config=CONFIG, state={})
    convert(("megatron", tmp_path / "run"), ("diffusers", tmp_path / "export"))
    exported = WanTransformer3DModel.from_pretrained(tmp_path / "export" / "transformer")

    latents_BCTHW = torch.randn(2, 16, 3, 4, 6, generator=generator)
    timestep_B = torch.tensor([500.0, 37.0])
    text_BLD = torch.randn(2, 7, 24, generator=generator)
    device = resolve_device("cpu")
    with single_process(device) as groups, torch.no_grad():
        model = build_model(CONFIG, groups, device)
        names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert names == parameter_shapes(CONFIG)
        load_model(checkpoint, model.named_parameters(), ShardGrid())
        ours = predict_velocity(model, latents_BCTHW, timestep_B, text_BLD, None, None)
        theirs = exported(latents_BCTHW, timestep_B, text_BLD, return_dict=False)[0]
    assert theirs.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-4)
