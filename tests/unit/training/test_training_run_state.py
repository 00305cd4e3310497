"""What a resumed run changes in its checkpoint's settings is decided by the first rank's reading."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from helpers.base_weights import write_base
from helpers.ranks import run_ranks

from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.distributed import shutdown
from megatron_flashi2v.training.run_state import Provenance, require_model_of, settle_changes

STATE = {"iteration": 2, "seed": 1, "data": {"fingerprint": "f"}}
"""As version 0.1 wrote it: without the flags, which its run's config.yaml holds."""


def resume(rank: int, root: Path) -> None:
    """The first rank finds the old rate; the other one what the first has written in its place, or nothing at all."""
    dist.init_process_group("gloo")
    flags = {"lr": 0.02, "lr_decay_style": "constant", "lr_decay_iters": None, "train_iters": 4}
    now = Provenance(
        seed=1, data_name="d", data={"fingerprint": "f"}, layout={}, config=flags, started_from=None,
        overrides_schedule=False, commit=None,
    )
    for case in ("rewritten", "gone"):
        folder = root / f"{case}-{rank}" / "iter_0000002"
        folder.mkdir(parents=True)
        if not (rank and case == "gone"):
            text = yaml.safe_dump({**flags, "lr": 0.02 if rank else 0.01})
            (folder.parent / "config.yaml").write_text(text + "begun: 2026-11-28\n")  # a value that JSON has not
        with pytest.raises(ConfigError, match=r"--lr is 0\.02 and was 0\.01"):
            settle_changes(folder, dict(STATE), now)
    shutdown()


def test_ranks_decide_by_the_first_ones_config_yaml(tmp_path: Path) -> None:
    run_ranks(resume, 2, tmp_path, tmp_path, timeout=60)


@pytest.mark.parametrize("conditioning, refused", [("flashi2v", False), ("text_to_video", False), ("wan_i2v", True)])
def test_fields_that_a_paradigm_does_not_read_may_differ(tmp_path: Path, conditioning: str, refused: bool) -> None:
    stored = ModelConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=1, latent_channels=4, text_dim=8,
        text_length=6, conditioning=conditioning, image_dim=20,
    )
    folder = write_base(tmp_path / "base", stored)
    require_model_of(folder, stored)
    other = dataclasses.replace(stored, image_dim=24)
    if refused:
        with pytest.raises(CheckpointError, match="image_dim is 20 in the checkpoint, 24 was asked for"):
            require_model_of(folder, other)
    else:
        require_model_of(folder, other)
    with pytest.raises(CheckpointError, match="text_dim is 8"):
        require_model_of(folder, dataclasses.replace(other, text_dim=12))
