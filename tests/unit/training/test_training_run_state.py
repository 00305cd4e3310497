"""What a resumed run changes in its checkpoint's settings is decided by the first rank's reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from helpers.ranks import run_ranks

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.distributed import shutdown
from megatron_flashi2v.training.run_state import Provenance, settle_changes

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
