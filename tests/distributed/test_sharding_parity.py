"""However replicas divide optimizer, gradients and weights, the run is one process's; checkpoints go any way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layouts import (
    Layout,
    assert_same_metrics,
    assert_same_velocity,
    assert_same_weights,
    metrics,
    run_layouts,
    tensors,
)
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.index import read_index

STRATEGY, INSTANCES = "--data-parallel-sharding-strategy", "--num-distributed-optimizer-instances"
OPTIM, GRADS, PARAMS = ((STRATEGY, strategy) for strategy in ("optim", "optim_grads", "optim_grads_params"))
HSDP = (INSTANCES, "2")
TP2_SP = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
CP2 = ("--context-parallel-size", "2")
RING = (*CP2, "--context-parallel-algo", "ring")
RECOMPUTE, LAYERS = "--recompute-granularity", "--recompute-num-layers"
BF16, EMA = "--bf16", ("--ema-decay", "0.9")
ADAPTIVE = ("--clip-grad-method", "adaptive-npu", "--clip-grad", "0.33", "--clip-grad-ema-decay", "0.5")
STANDING = ("--lr", "0", "--exit-interval", "1")  # an iteration that changes no weight

LAYOUTS = [
    Layout("params", 2, PARAMS),
    Layout("grads", 2, GRADS),
    Layout("params-tp2-sp", 4, (*PARAMS, *TP2_SP)),
]
LONG_LAYOUTS = [
    Layout("params-alone", 1, PARAMS),  # nobody to divide with
    Layout("grads-alone", 1, GRADS),
    Layout("params-copies", 2, (*PARAMS, *HSDP)),
    Layout("params-4", 4, PARAMS),
    Layout("grads-4", 4, GRADS),
    Layout("optim-4", 4, OPTIM),
    Layout("optim-hsdp", 4, (*OPTIM, *HSDP)),
    Layout("params-hsdp", 4, (*PARAMS, *HSDP)),
    Layout("grads-hsdp", 4, (*GRADS, *HSDP)),
    Layout("grads-tp2-sp", 4, (*GRADS, *TP2_SP)),
    Layout("params-cp2", 4, (*PARAMS, *CP2)),
    Layout("params-ring", 4, (*PARAMS, *RING)),
    Layout("grads-ring", 4, (*GRADS, *RING)),
    Layout("params-tp2-sp-cp2", 4, (*PARAMS, *TP2_SP, *CP2)),
    Layout("grads-early-gather", 2, (*GRADS, "--overlap-param-gather")),
    Layout("params-small-unit", 2, (*PARAMS, "--suggested-communication-unit-size", "1000")),
    Layout("params-uniform", 2, (*PARAMS, RECOMPUTE, "full")),
    Layout("params-uniform-2", 2, (*PARAMS, RECOMPUTE, "full", LAYERS, "2")),
    Layout("params-block", 2, (*PARAMS, RECOMPUTE, "full", "--recompute-method", "block", LAYERS, "2")),
    Layout("params-skip-attention", 2, (*PARAMS, RECOMPUTE, "skip_attention")),
    Layout("params-selective", 2, (*PARAMS, RECOMPUTE, "selective")),
]
BF16_LAYOUTS = [
    Layout("bf16-optim", 2, (BF16, *OPTIM)),
    Layout("bf16-grads", 2, (BF16, *GRADS)),
    Layout("bf16-params-4", 4, (BF16, *PARAMS)),
    Layout("bf16-params-hsdp", 4, (BF16, *PARAMS, *HSDP)),
    Layout("bf16-params-tp2-sp", 4, (BF16, *PARAMS, *TP2_SP)),
    Layout("bf16-params-ring", 4, (BF16, *PARAMS, *RING)),
]


def common_flags(data: Path, iterations: int) -> list[str]:
    """Two microbatches on each of two replicas. Epsilon keeps Adam from making a rounding a step."""
    return ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", str(iterations),
            "--seed", "7", "--lr-warmup-iters", "0", "--micro-batch-size", "1", "--global-batch-size", "4",
            "--lr", "1e-4", "--adam-eps", "1e-5", *EMA]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 6, (16, 2, 8, 10), 64, 32, seed=3)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs in fp32, and in bf16 half a sharded one and its rest in one process."""
    folder = tmp_path_factory.mktemp("sharding")
    half, rest = ("--exit-interval", "2"), ("--load", str(folder / "bf16-half"))
    layouts = [
        Layout("single", 1), *LAYOUTS,
        Layout("adaptive", 1, ADAPTIVE),
        Layout("adaptive-params", 2, (*PARAMS, *ADAPTIVE)),
        Layout("bf16", 1, (BF16,)),
        Layout("bf16-half", 2, (BF16, *PARAMS, *half)),
        Layout("initial", 1, (BF16, *STANDING)),
        Layout("initial-params", 4, (BF16, *PARAMS, *TP2_SP, *STANDING)),
        Layout("loaded", 2, (BF16, *PARAMS, *STANDING, "--seed", "8", "--load-weights",
                             f"megatron:{folder / 'initial'}")),
    ]
    saves = run_layouts(layouts, folder, common_flags(data, 3))
    parts = [
        Layout("bf16-rest", 1, (BF16, *rest)),
        Layout("bf16-again", 2, (BF16, *GRADS, *rest), saves_again=True),
    ]
    return saves | run_layouts(parts, folder, common_flags(data, 3))


def assert_same_state(run: Path, reference: Path) -> None:
    """Moments and average agree, tensor by tensor, and none is missing."""
    found, expected = (tensors(find_checkpoint(save), "") for save in (run, reference))
    assert found.keys() == expected.keys() and any(key.startswith("ema.") for key in found)
    for key, want in expected.items():
        if not key.startswith("model."):
            error, scale = (found[key] - want).norm(), want.norm()
            assert error <= 1e-4 * scale + 1e-10 * want.numel() ** 0.5, f"{run.name}: {key} is {error:.1e} off"


def assert_trains_like(run: Path, single: Path) -> None:
    assert_same_metrics(run, single)
    assert_same_weights(run, single)
    assert_same_velocity(run, single)
    assert_same_state(run, single)


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_sharded_replicas_train_like_one_process(runs: dict[str, Path], name: str) -> None:
    assert_trains_like(runs[name], runs["single"])


def test_adaptive_clipping_takes_the_norm_of_all_shards(runs: dict[str, Path]) -> None:
    assert_trains_like(runs["adaptive-params"], runs["adaptive"])
    clipped, plain = (tensors(find_checkpoint(runs[name])) for name in ("adaptive", "single"))
    assert any(not torch.equal(clipped[key], plain[key]) for key in plain), "nothing was clipped, which proves nothing"


@pytest.mark.parametrize("name", ["initial-params", "loaded"])
def test_initial_weights_are_bit_equal(runs: dict[str, Path], name: str) -> None:
    found, expected = (tensors(find_checkpoint(runs[run]), "") for run in (name, "initial"))
    keys = [key for key in expected if key.startswith(("model.", "ema.", "optimizer.master."))]
    assert keys and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in keys)


def test_one_process_goes_on_from_sharded_weights_in_bf16(runs: dict[str, Path]) -> None:
    rows = metrics(runs["bf16-half"]) + metrics(runs["bf16-rest"])
    for row, want in zip(rows, metrics(runs["bf16"]), strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)


def test_a_checkpoint_of_sharded_weights_is_loaded_bit_for_bit(runs: dict[str, Path]) -> None:
    stored, found = (tensors(find_checkpoint(runs[name]), "") for name in ("bf16-half", "bf16-again"))
    assert stored.keys() == found.keys() == tensors(find_checkpoint(runs["bf16"]), "").keys()
    assert {"optimizer.master.", "optimizer.exp_avg_sq.", "ema.blocks.", "model.blocks."} <= {
        part for part in ("optimizer.master.", "optimizer.exp_avg_sq.", "ema.blocks.", "model.blocks.")
        for key in stored if key.startswith(part)
    }
    assert all(torch.equal(found[key], value) for key, value in stored.items())


def test_every_rank_writes_its_share_alone(runs: dict[str, Path]) -> None:
    written: dict[str, int] = {}
    for tensor in read_index(find_checkpoint(runs["params"])).tensors.values():
        for piece in tensor.pieces:
            assert piece.flat_range is not None
            written[piece.file] = written.get(piece.file, 0) + piece.flat_range[1] - piece.flat_range[0]
    assert len(written) == 2 and max(written.values()) < 0.55 * sum(written.values())


@pytest.fixture(scope="module")
def long_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    layouts = [Layout("single", 1), Layout("bf16", 1, (BF16,)), *LAYOUTS, *LONG_LAYOUTS, *BF16_LAYOUTS]
    return run_layouts(layouts, tmp_path_factory.mktemp("long"), common_flags(data, 10), timeout=3000)


@pytest.mark.long
@pytest.mark.parametrize("name", [layout.name for layout in (*LAYOUTS, *LONG_LAYOUTS)])
def test_every_sharded_layout_trains_like_one_process(long_runs: dict[str, Path], name: str) -> None:
    assert len(metrics(long_runs[name])) == 10
    assert_trains_like(long_runs[name], long_runs["single"])


@pytest.mark.long
@pytest.mark.parametrize("name", [layout.name for layout in BF16_LAYOUTS])
def test_every_sharded_layout_trains_like_one_process_in_bf16(long_runs: dict[str, Path], name: str) -> None:
    assert len(metrics(long_runs[name])) == 10
    assert_same_metrics(long_runs[name], long_runs["bf16"], relative=2e-2)


CHAIN = [
    (4, ()), (2, PARAMS), (4, (*PARAMS, *TP2_SP)), (4, (*PARAMS, *HSDP)), (2, GRADS), (1, ()),
]


@pytest.mark.long
def test_a_run_that_changes_its_layout_goes_on(data: Path, tmp_path: Path) -> None:
    saves = run_layouts([Layout("single", 1)], tmp_path, common_flags(data, 2 * len(CHAIN)))
    for world, flags in CHAIN:
        part = Layout("chain", world, (*flags, "--load", str(tmp_path / "chain"), "--exit-interval", "2"))
        saves |= run_layouts([part], tmp_path, common_flags(data, 2 * len(CHAIN)))
    assert_same_metrics(saves["chain"], saves["single"])
    assert_same_weights(saves["chain"], saves["single"])
    assert_same_state(saves["chain"], saves["single"])
