"""SIGTERM over processes: the run saves and leaves within the grace period, whichever process gets it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from helpers.layouts import metrics
from helpers.processes import launched
from helpers.synthetic_data import write_synthetic
from helpers.train_command import FLAGS, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

from megatron_flashi2v.checkpoint.folders import find_checkpoint

GRACE_S = 30.0
"""After which torchrun kills."""


@pytest.mark.parametrize("whom", ["launcher", "one rank"])
def test_all_ranks_save_and_leave(tmp_path: Path, whom: str) -> None:
    data = write_synthetic(tmp_path / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)
    save = tmp_path / "run"
    values = {**FLAGS, "data-path": data, "save": save, "train-iters": 100_000}
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    with launched(2, flags, tmp_path) as launch:
        launch.wait_for_rows(save, 3)
        os.kill(launch.process.pid if whom == "launcher" else launch.rank(1), signal.SIGTERM)
        began = time.monotonic()
        code = launch.wait(GRACE_S + 20)
        assert time.monotonic() - began < GRACE_S
    assert (code == 0) == (whom == "one rank")  # torchrun tells that it was stopped
    rows = metrics(save)
    assert find_checkpoint(save) == save / f"iter_{rows[-1]['iteration']:07d}"
    assert not launch.errors()
