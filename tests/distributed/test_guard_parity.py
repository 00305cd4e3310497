"""One rank's fault: an update that is not finite is skipped by all, as if it had been left out; a slow one is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.layouts import Layout, metrics, run_layouts, tensors, without_times
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.checkpoint.folders import find_checkpoint

LAYOUTS = {
    "dp2": ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    "tp2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "pp2": ("--pipeline-model-parallel-size", "2"),
    "fsdp2": ("--data-parallel-sharding-strategy", "optim_grads_params"),
}
FAULTS = ("nan_output", "infinite_gradient")


def flags(data: Path) -> list[str]:
    return ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "4", "--seed", "7",
            "--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "0.01"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 8, (16, 3, 8, 12), 64, 32, seed=3)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    layouts = [Layout(f"{name}-{fault}", 2, more, fault=fault)
               for name, more in LAYOUTS.items() for fault in (*FAULTS, "left_out")]
    layouts.append(Layout("slow", 2, ("--train-iters", "11"), fault="slow_rank"))
    return run_layouts(layouts, tmp_path_factory.mktemp("runs"), flags(data))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_skip_the_update(runs: dict[str, Path], name: str, fault: str) -> None:
    run, left_out = runs[f"{name}-{fault}"], runs[f"{name}-left_out"]
    rows, expected = metrics(run), metrics(left_out)
    spoiled = rows.pop(1)
    assert spoiled["skipped"] == ("loss_not_finite" if fault == "nan_output" else "grad_norm_not_finite")
    assert spoiled["grad_norm"] is None and (spoiled["loss"] is None) == (fault == "nan_output")
    del expected[1]
    for row, want in zip(rows, expected, strict=True):
        assert without_times(row) == without_times(want)
    found, wanted = (tensors(find_checkpoint(save), prefix="") for save in (run, left_out))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_a_slow_replica_is_named(runs: dict[str, Path]) -> None:
    """Told in iteration 11: the times of ten iterations in a row, each of which travels with the next one's loss."""
    (line,) = (runs["slow"] / "warnings-0.txt").read_text().splitlines()
    assert line.startswith("replica 1 (on ") and "has been slow for 10 iterations" in line
    assert not any((save / "warnings-0.txt").read_text().count("replica") for name, save in runs.items()
                   if name != "slow")


def test_all_ranks_stop_with_one_message(data: Path, tmp_path: Path) -> None:
    """Weights that a huge rate has spoiled: no update follows, no checkpoint, and the launcher fails."""
    huge = ["--optimizer", "sgd", "--lr", "1e30", "--clip-grad", "0", "--save-interval", "1", "--train-iters", "9"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "megatron_flashi2v", "train", *flags(data), *huge, "--save", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "flashi2v train: error: " in line]
    assert len(errors) == 1 and "4 updates in a row are not to be applied" in errors[0]
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]
    assert [row.get("skipped") for row in metrics(tmp_path)] == [None, *["loss_not_finite"] * 3]
