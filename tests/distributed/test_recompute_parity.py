"""Every recompute mode gives bit-equal gradients to none, over ranks too: its collectives are run again in backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layouts import Layout, assert_ranks_agree, assert_same_metrics, run_layouts, tensors
from helpers.synthetic_data import write_synthetic

TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
GRANULARITY, METHOD, LAYERS = "--recompute-granularity", "--recompute-method", "--recompute-num-layers"
LAYOUTS = {
    "tp2-sp": (2, (TP, "2", "--sequence-parallel")),
    "cp2-ulysses": (2, (CP, "2")),
    "cp3-ring": (3, (CP, "3", "--context-parallel-algo", "ring")),  # of 40 tokens: with padding
    "pp2-virtual2": (2, (PP, "2", "--num-virtual-stages-per-pipeline-rank", "2")),
    "dp2-overlap": (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
}
MODES = {
    "uniform": (GRANULARITY, "full", METHOD, "uniform", LAYERS, "2"),
    "block": (GRANULARITY, "full", METHOD, "block", LAYERS, "1"),
    "skip_attention": (GRANULARITY, "skip_attention"),
    "selective": (GRANULARITY, "selective"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five layers on every layout in every mode, two iterations of two microbatches; the loss of the second one shows
    the first one's gradients, also where replicas divide them."""
    folder = tmp_path_factory.mktemp("recompute")
    data = write_synthetic(folder / "set", 6, (16, 2, 8, 10), 64, 32, seed=3)
    common = ["--model", "tiny", "--num-layers", "5", "--data-path", str(data), "--device", "cpu", "--train-iters", "2",
              "--seed", "7", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3"]  # fmt: skip
    layouts = [
        Layout(f"{name}-{mode}", world, (*flags, *more))
        for name, (world, flags) in LAYOUTS.items() for mode, more in {"none": (), **MODES}.items()
    ]
    return run_layouts(layouts, folder, common)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_recomputed_gradients_are_bit_equal(runs: dict[str, Path], name: str, mode: str) -> None:
    run, kept = runs[f"{name}-{mode}"], runs[f"{name}-none"]
    assert_same_metrics(run, kept, relative=0.0)
    assert_ranks_agree(run)
    found, expected = tensors(run / "gradients"), tensors(kept / "gradients")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
