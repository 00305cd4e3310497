"""A run whose ranks are killed at random moments is, after plain relaunches, the uninterrupted run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.synthetic_data import write_synthetic
from helpers.train_command import FLAGS, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

TOOL = Path(__file__).parents[2] / "tools" / "kill_test.py"


LONG = pytest.mark.long


@pytest.mark.parametrize(("kills", "more"), [
    (2, ()), pytest.param(20, (), marks=LONG), pytest.param(20, ("--async-save",), marks=LONG),
])  # fmt: skip
def test_killed_ranks_cost_nothing_but_time(tmp_path: Path, kills: int, more: tuple[str, ...]) -> None:
    data = write_synthetic(tmp_path / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)
    flags = {**FLAGS, "data-path": data, "train-iters": 40 * (kills + 1), "save-interval": 1, "keep-last": 3,
             "ema-decay": 0.9}  # so many iterations that the last kill comes before the end
    command = [
        sys.executable, str(TOOL), "--folder", str(tmp_path / "runs"), "--kills", str(kills), "--seed", "1", "--",
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))), "--use-distributed-optimizer",
        *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300 * (kills + 2), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("whole checkpoints") == kills and "too late" not in done.stdout
    assert "equal bit for bit" in done.stdout
