"""Checkpoints that are written beside training, by replicas that share the optimizer's state and by tensor ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.layouts import Layout, metrics, run_layouts
from helpers.synthetic_data import write_synthetic

ONCE = {
    "dp2": ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    "tp2": ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--bf16"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("async")
    data = write_synthetic(folder / "set", 6, (16, 2, 8, 10), 64, 32, seed=3)
    layouts = [
        Layout(f"{name}-{how}", 2, (*flags, *(("--async-save",) if how == "beside" else ())))
        for name, flags in ONCE.items() for how in ("once", "beside")
    ]
    middle = str(folder / "dp2-beside" / "iter_0000002")
    layouts.append(Layout("dp2-rest", 2, (*ONCE["dp2"], "--load", middle)))
    common = [
        "--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "4", "--seed", "7",
        "--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-2", "--ema-decay", "0.9",
        "--save-interval", "2",
    ]  # fmt: skip
    return run_layouts(layouts, folder, common)


@pytest.mark.parametrize("name", ONCE)
def test_the_same_files_as_when_training_waits(runs: dict[str, Path], name: str) -> None:
    once, beside = (
        {str(path.relative_to(runs[run])): path.read_bytes() for path in runs[run].glob("*iter_*/*")}
        for run in (f"{name}-once", f"{name}-beside")
    )
    assert {path.split("/")[0] for path in once} == {"iter_0000002", "iter_0000004"}
    assert sum("safetensors" in path for path in once) == 4
    assert beside == once


def test_a_run_goes_on_from_one_of_them(runs: dict[str, Path]) -> None:
    rest, whole = ([(row["loss"], row["grad_norm"]) for row in metrics(runs[run])] for run in ("dp2-rest", "dp2-once"))
    assert len(rest) == 2 and rest == whole[2:]
