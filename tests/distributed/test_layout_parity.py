"""Whatever the layout, the run is the same: losses, gradient norms, gradients and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.layouts import (
    Layout,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_weights,
    metrics,
    run_layouts,
)
from helpers.synthetic_data import write_synthetic

TP, PP, SP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--sequence-parallel"
LAYOUTS = [
    Layout("tp2", 2, (TP, "2")),
    Layout("tp2-sp", 2, (TP, "2", SP)),
    Layout("pp2", 2, (PP, "2")),
    Layout("dp2", 2),
    Layout("tp2-pp2", 4, (TP, "2", PP, "2")),
    Layout("tp2-sp-pp2", 4, (TP, "2", PP, "2", SP)),
]
SGD = ("--optimizer", "sgd", "--lr", "0.05")


def common_flags(data: Path) -> list[str]:
    return ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "5", "--seed", "7",
            "--micro-batch-size", "2", "--global-batch-size", "4", "--lr-warmup-iters", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 6, (16, 3, 8, 12), 64, 32, seed=3)


@pytest.fixture(scope="module")
def sgd_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    layouts = [Layout("single", 1), *LAYOUTS]
    return run_layouts(layouts, tmp_path_factory.mktemp("sgd"), [*common_flags(data), *SGD])


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_layout_trains_like_one_process(sgd_runs: dict[str, Path], name: str) -> None:
    assert_same_metrics(sgd_runs[name], sgd_runs["single"])
    assert_same_gradients(sgd_runs[name], sgd_runs["single"])
    assert_same_weights(sgd_runs[name], sgd_runs["single"])


def test_the_reference_run_learns(sgd_runs: dict[str, Path]) -> None:
    losses = [row["loss"] for row in metrics(sgd_runs["single"])]
    assert len(set(losses)) == 5
    assert losses[0] == pytest.approx(2.0, rel=0.2)  # a zero head predicts 0 for noise - latents of unit variance
