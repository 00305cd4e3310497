"""Random weights to train beside, as a checkpoint without a run."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.checkpoints import save_checkpoint
from helpers.reference_weights import random_weights
from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.model import ModelConfig


def write_base(root: Path, config: ModelConfig, seed: int = 5) -> Path:
    """A ``--load-weights megatron:`` folder, none of whose tensors is zero; the ``iter_*`` folder in it."""
    weights = random_weights(config, "wan", torch.Generator().manual_seed(seed))
    pieces = [
        TensorPiece.whole(f"model.{row.ours}", row.to_ours([weights[name] for name in row.external]).contiguous())
        for row in mappings(config, "wan")
    ]
    return save_checkpoint(
        root, 0, pieces=pieces, model_config=config, state={"iteration": 0, "consumed_samples": 0}
    )
