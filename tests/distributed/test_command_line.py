"""``flashi2v train`` under torchrun, in processes that share nothing: each has its own seed of Python's hashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.layouts import assert_same_metrics, assert_same_weights, metrics
from helpers.synthetic_data import write_synthetic

FLAGS = ["--model", "tiny", "--device", "cpu", "--train-iters", "10", "--seed", "7", "--micro-batch-size", "2",
         "--global-batch-size", "4", "--optimizer", "sgd", "--lr", "0.05"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ten iterations of one process; and of tensor-parallel ranks, then replicas, in the same folder."""
    folder = tmp_path_factory.mktemp("command")
    data = write_synthetic(folder / "set", 6, (16, 2, 8, 10), 64, 32, seed=3)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}

    def train(name: str, processes: int, *flags: str) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "-m", "megatron_flashi2v", "train", *FLAGS, "--data-path", str(data), "--save", str(folder / name),
            "--load", str(folder / name), *flags,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-6000:]

    train("single", 1)
    train("divided", 2, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--exit-interval", "5")
    train("divided", 2)
    return {name: folder / name for name in ("single", "divided")}


def test_a_divided_run_is_that_of_one_process(runs: dict[str, Path]) -> None:
    assert len(metrics(runs["divided"])) == 10
    assert_same_metrics(runs["divided"], runs["single"])
    assert_same_weights(runs["divided"], runs["single"])
