"""Bad samples over ranks: every layout fills and records the same, and all ranks stop with one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.damage import spoil_bytes, spoil_values
from helpers.layouts import Layout, assert_same_metrics, run_layouts
from helpers.synthetic_data import write_synthetic

LAYOUTS = [
    Layout("dp2", 2),
    Layout("tp2", 2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    Layout("pp2", 2, ("--pipeline-model-parallel-size", "2")),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of eight samples are bad."""
    folder = write_synthetic(tmp_path_factory.mktemp("data") / "set", 8, (16, 3, 8, 12), 64, 32, seed=3)
    spoil_bytes(folder, 2)
    spoil_values(folder, 5, lambda latents: latents / 0)
    return folder


def flags(data: Path) -> list[str]:
    return ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "4", "--seed", "7",
            "--micro-batch-size", "2", "--global-batch-size", "4", "--optimizer", "sgd", "--lr", "0.05"]


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_layouts([Layout("single", 1), *LAYOUTS], tmp_path_factory.mktemp("runs"), flags(data))


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_every_layout_fills_and_records_the_same(runs: dict[str, Path], name: str) -> None:
    assert_same_metrics(runs[name], runs["single"])
    records = [(runs[run] / "bad_samples.jsonl").read_text() for run in (name, "single")]
    assert records[0] == records[1] and records[0].count("\n") >= 4


def test_all_ranks_stop_with_one_message(data: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "megatron_flashi2v", "train", *flags(data), "--save", str(tmp_path), "--max-bad-samples", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "flashi2v train: error: " in line]
    assert len(errors) == 1
    first = (runs["single"] / "bad_samples.jsonl").read_text().splitlines()[0]
    assert "2 bad samples were met, and --max-bad-samples allows 1" in errors[0]
    assert (tmp_path / "bad_samples.jsonl").read_text().splitlines()[0] == first
