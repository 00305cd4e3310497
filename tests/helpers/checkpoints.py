"""Checkpoints of random weights, written without a training run, and what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.retention import KEEP_ALL, Retention
from megatron_flashi2v.checkpoint.saving import CheckpointSave
from megatron_flashi2v.checkpoint.storage import TensorPiece, keys, read_index, read_pieces
from megatron_flashi2v.config.model import ModelConfig

# Three heads, a width that is no power of two, and settings that no shape can tell.
ODD = ModelConfig(
    num_layers=2,
    hidden_size=30,
    ffn_hidden_size=22,
    num_attention_heads=3,
    latent_channels=4,
    freq_dim=16,
    text_dim=14,
    text_length=6,
    phi_hidden_channels=5,
    phi_kernel_size=(3, 3, 3),
    phi_order="repeat_then_conv",
    text_cleaning="light",
    norm_eps=1e-5,
)


def save_checkpoint(
    root: Path,
    iteration: int,
    *,
    pieces: Iterable[TensorPiece],
    model_config: ModelConfig,
    state: Mapping[str, Any],
    retention: Retention = KEEP_ALL,
    adapter: AdapterRecord | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Path:
    """All steps of one save, as training does them when it waits; every rank calls it. The published folder."""
    save = CheckpointSave(
        root, iteration, pieces=pieces, model_config=model_config, adapter=adapter, state=state, retention=retention,
        peers=Peers(rank, world_size),
    )
    save.finish()
    return save.folder


def read_full(folder: Path, key: str) -> torch.Tensor:
    """One whole tensor of a sharded folder, on the host, in its stored dtype."""
    index = read_index(folder)
    tensor = torch.empty(index.tensors[key].shape, dtype=index.tensors[key].dtype)
    read_pieces(folder, [TensorPiece.whole(key, tensor)], index=index)
    return tensor


def tensors_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random weights; under a bf16 run matrices are bf16 and the rest fp32."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}


def checkpoint(root: Path, config: ModelConfig = ODD, bf16: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights, some of them in two slices; the model's tensors as stored."""
    tensors = tensors_of(config)
    pieces = []
    for name, exact in tensors.items():
        low = bf16 and exact.dim() > 1
        stored = exact.to(torch.bfloat16) if low else exact
        if low:
            pieces.append(TensorPiece.whole(f"optimizer.master.{name}", exact))
        if exact.dim() == 2 and exact.shape[1] % 2 == 0:
            half = exact.shape[1] // 2
            pieces += [
                TensorPiece(
                    key=f"model.{name}",
                    global_shape=tuple(exact.shape),
                    offset=(0, start),
                    shape=(exact.shape[0], half),
                    data=stored[:, start : start + half],
                )
                for start in (0, half)
            ]
        else:
            pieces.append(TensorPiece.whole(f"model.{name}", stored))
        tensors[name] = stored
    save_checkpoint(root, 40, pieces=pieces, model_config=config, state={"iteration": 40})
    return tensors


def model_tensors(root: Path) -> dict[str, torch.Tensor]:
    folder = find_checkpoint(root)
    assert folder is not None
    return {
        key.removeprefix("model."): read_full(folder, key) for key in keys(folder) if key.startswith("model.")
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}
