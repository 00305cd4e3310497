"""What a run tells of itself is the same at every layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.layouts import Layout, assert_same_metrics, metrics, run_layouts, tensors, weights
from helpers.synthetic_data import write_synthetic
from safetensors.torch import load_file

from megatron_flashi2v.runtime.files import read_jsonl

TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
LAYOUTS = [
    Layout("tp2", 2, (TP, "2")),
    Layout("tp2-sp", 2, (TP, "2", "--sequence-parallel")),
    Layout("pp2-virtual2", 2, (PP, "2", "--num-virtual-stages-per-pipeline-rank", "2",
                               "--profile-ranks", "0", "1")),
    Layout("cp2", 2, (CP, "2")),
    Layout("dp2-overlap", 2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
    Layout("fsdp2", 2, ("--data-parallel-sharding-strategy", "optim_grads_params")),
]
BATCH = 8
TRACED = "pp2-virtual2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run by every layout and by one process."""
    folder = tmp_path_factory.mktemp("watching")
    data, valid = (write_synthetic(folder / str(seed), 6, (16, 2, 8, 10), 64, 32, seed=seed) for seed in (3, 4))
    flags = ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "4", "--seed", "7",
             "--micro-batch-size", "2", "--global-batch-size", str(BATCH), "--lr", "2e-4", "--log-norms-interval", "2",
             "--valid-data-path", str(valid), "--eval-interval", "2", "--eval-iters", "2",
             "--sample-interval", "4", "--sample-count", "3", "--sample-num-steps", "2"]
    (folder / TRACED).mkdir()
    (folder / TRACED / "profile").touch()
    return run_layouts([Layout("single", 1), *LAYOUTS], folder, flags)


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_loss_by_sigma(runs: dict[str, Path], layout: str) -> None:
    assert_same_metrics(runs[layout], runs["single"])
    filled = set()
    for row, want in zip(metrics(runs[layout]), metrics(runs["single"]), strict=True):
        means, counts = row["loss_by_sigma"], row["samples_by_sigma"]
        assert counts == want["samples_by_sigma"] and sum(counts) == BATCH
        assert means == [None if mean is None else pytest.approx(mean, rel=1e-5) for mean in want["loss_by_sigma"]]
        total = sum(mean * count for mean, count in zip(means, counts, strict=True) if count)
        assert total / BATCH == pytest.approx(row["loss"], rel=1e-6)
        filled |= {index for index, count in enumerate(counts) if count}
    assert len(filled) > 3


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_norms_by_part(runs: dict[str, Path], layout: str) -> None:
    for row, want in zip(metrics(runs[layout]), metrics(runs["single"]), strict=True):
        assert ("grad_norm_by_part" in row) == (row["iteration"] % 2 == 0)
        if "grad_norm_by_part" not in row:
            continue
        for name in ("grad_norm_by_part", "param_norm_by_part"):
            assert row[name] == pytest.approx(want[name], rel=1e-5)
        total = math.fsum(norm**2 for norm in row["grad_norm_by_part"].values())
        assert math.sqrt(total) == pytest.approx(row["grad_norm"], rel=1e-6)


def test_norms_are_those_of_the_saved_weights_and_gradients(runs: dict[str, Path]) -> None:
    """The last iteration's gradients, whole; the weights that it updated are a learning rate away."""
    row = metrics(runs["single"])[-1]
    gradients, trained = tensors(runs["single"] / "gradients"), weights(runs["single"])
    prefixes = {"patch_embedding": "patch_embedding", "phi": "conditioning.phi", "blocks_01_01": "blocks.1",
                "fourier_embedding": "conditioning.fourier_embedding", "head": "head"}
    for part, prefix in prefixes.items():
        for name, of, relative in (("grad_norm_by_part", gradients, 1e-5), ("param_norm_by_part", trained, 2e-2)):
            norms = [value.double().norm() for key, value in of.items() if key.startswith(f"model.{prefix}.")]
            assert norms and row[name][part] == pytest.approx(float(torch.stack(norms).norm()), rel=relative), part


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_validation_loss(runs: dict[str, Path], layout: str) -> None:
    rows, expected = (read_jsonl(runs[name] / "validation.jsonl") for name in (layout, "single"))
    assert [row["iteration"] for row in rows] == [2, 4]
    for row, want in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["samples_by_sigma"] == [2] * 8
        assert row["loss_by_sigma"] == pytest.approx(want["loss_by_sigma"], rel=1e-5)


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_samples(runs: dict[str, Path], layout: str) -> None:
    for index in range(3):  # replicas share them
        name = f"samples/iter_0000004/sample_{index:03d}.safetensors"
        found, expected = (load_file(runs[run] / name)["latents_BCTHW"] for run in (layout, "single"))
        assert expected.std() > 0.1
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_trace_on_demand_is_written_by_all_ranks_asked(runs: dict[str, Path]) -> None:
    names = sorted(path.name for path in (runs[TRACED] / "traces").iterdir())
    assert names == [f"iterations_0000002_0000003_rank_{rank}.json" for rank in (0, 1)]
    assert not (runs[TRACED] / "profile").exists()
