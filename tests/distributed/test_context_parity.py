"""Token counts that fit no layout: padded ranks, and ranks with nothing else, train like one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.layouts import (
    Layout,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_velocity,
    assert_same_weights,
    metrics,
    run_layouts,
)
from helpers.synthetic_data import write_synthetic

TP, PP, SP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--sequence-parallel"
CP, RING = "--context-parallel-size", ("--context-parallel-algo", "ring")
USP = ("--context-parallel-algo", "usp", "--ulysses-degree", "2")
# 125 tokens, with padding in every layout.
LAYOUTS = [
    Layout("tp2-sp", 2, (TP, "2", SP)),
    Layout("cp2-ulysses", 2, (CP, "2")),
    Layout("cp4-usp", 4, (CP, "4", *USP)),
    Layout("tp2-sp-cp2-ring", 4, (TP, "2", SP, CP, "2", *RING)),
    Layout("pp2-cp2", 4, (PP, "2", CP, "2")),
]
# Five tokens over four ranks: two, two, one and none.
FEW = [Layout("few-tp2-sp-cp2", 4, (TP, "2", SP, CP, "2")), Layout("few-cp4-ring", 4, (CP, "4", *RING))]
SGD = ("--optimizer", "sgd", "--lr", "0.05")


def common_flags(data: Path) -> list[str]:
    return ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "3", "--seed", "7",
            "--micro-batch-size", "2", "--global-batch-size", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One launch per world size: SGD on 125 tokens and on 5, and, with AdamW, bf16 and a run that goes on elsewhere."""
    folder = tmp_path_factory.mktemp("context")
    data = write_synthetic(folder / "data", 6, (16, 5, 10, 10), 64, 32, seed=3)
    few = ("--data-path", str(write_synthetic(folder / "few", 6, (16, 5, 2, 2), 64, 32, seed=4)))
    adam = ("--optimizer", "adam", "--lr", "1e-3")
    layouts = [
        Layout("single", 1), Layout("few-single", 1, few),
        *LAYOUTS, *(Layout(layout.name, layout.world, (*layout.flags, *few)) for layout in FEW),
        Layout("adam-single", 1, adam),
        Layout("cp3-half", 3, (CP, "3", *RING, *adam, "--exit-interval", "2", "--use-distributed-optimizer")),
        Layout("tp2-rest", 4, (TP, "2", *adam, "--load", str(folder / "cp3-half"))),
        Layout("bf16-single", 1, (*adam, "--bf16")),
        Layout("bf16-cp2-ulysses", 2, (*adam, "--bf16", CP, "2")),
        Layout("bf16-cp2-ring", 2, (*adam, "--bf16", CP, "2", *RING)),
    ]
    return run_layouts(layouts, folder, [*common_flags(data), *SGD])


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS + FEW])
def test_context_parallel_ranks_train_like_one_process(runs: dict[str, Path], name: str) -> None:
    reference = runs["few-single" if name.startswith("few") else "single"]
    assert_same_metrics(runs[name], reference)
    assert_same_gradients(runs[name], reference)
    assert_same_weights(runs[name], reference)
    assert_same_velocity(runs[name], reference)


@pytest.mark.parametrize("name", ["bf16-cp2-ulysses", "bf16-cp2-ring"])
def test_bf16_stays_near(runs: dict[str, Path], name: str) -> None:
    assert_same_metrics(runs[name], runs["bf16-single"], 2e-3)


def test_resume_over_other_ranks_continues_the_run(runs: dict[str, Path]) -> None:
    rows, expected = metrics(runs["cp3-half"]) + metrics(runs["tp2-rest"]), metrics(runs["adam-single"])
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in expected]
    for row, want in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
