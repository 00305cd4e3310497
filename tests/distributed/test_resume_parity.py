"""A run that goes on with other numbers of processes, or at other layouts, is the run that was never interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.layouts import Layout, metrics, run_layouts
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_state

EVERY = 2
"""Iterations between two interruptions."""
WORLDS = (4, 2, 3, 4)
MODELS = (
    ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    ("--pipeline-model-parallel-size", "2"),
    ("--context-parallel-size", "2"),
)
# All that is resumed: Adam's moments, the average of the weights, a clipper that keeps statistics.
KEPT = ("--ema-decay", "0.9", "--clip-grad-method", "adaptive", "--lr", "2e-4")
BATCH = 12  # for 4, 2 and 3 replicas


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("resume")
    data = write_synthetic(folder / "set", 30, (16, 2, 8, 10), 64, 32, seed=3)  # passed through three times

    def run(layouts: list[Layout], iterations: int, *flags: str) -> dict[str, Path]:
        common = [
            "--model", "tiny", "--data-path", str(data), "--device", "cpu", "--seed", "7", "--lr-warmup-iters", "0",
            "--train-iters", str(iterations), "--micro-batch-size", "1", "--global-batch-size", str(BATCH), *KEPT,
        ]  # fmt: skip
        return run_layouts(layouts, folder, [*common, *flags])

    def part(name: str, world: int, *flags: str) -> Layout:
        return Layout(name, world, (*flags, "--load", str(folder / name), "--exit-interval", str(EVERY)))

    saves = run([Layout("single", 1)], EVERY * len(WORLDS))
    for world in WORLDS:
        saves |= run([part("worlds", world, "--use-distributed-optimizer")], EVERY * len(WORLDS))
    return saves | run([part("models", 2, *flags) for flags in MODELS], EVERY * len(WORLDS))


def samples(save: Path) -> dict[int, str]:
    """What was read at each position of the global order, by any rank."""
    rows = [json.loads(line) for path in save.glob("samples-*.jsonl") for line in path.read_text().splitlines()]
    found = dict(rows)
    assert all(found[position] == key for position, key in rows), f"ranks of {save.name} read different samples"
    return found


@pytest.mark.parametrize(("name", "parts"), [("worlds", len(WORLDS)), ("models", len(MODELS))])
def test_the_sequence_of_samples_is_the_same(runs: dict[str, Path], name: str, parts: int) -> None:
    expected = samples(runs["single"])
    assert sorted(expected) == list(range(BATCH * EVERY * len(WORLDS))) and len(set(expected.values())) == 30
    assert samples(runs[name]) == {p: key for p, key in expected.items() if p < BATCH * EVERY * parts}


@pytest.mark.parametrize(("name", "parts"), [("worlds", len(WORLDS)), ("models", len(MODELS))])
def test_losses_are_those_of_the_uninterrupted_run(runs: dict[str, Path], name: str, parts: int) -> None:
    rows, expected = metrics(runs[name]), metrics(runs["single"])[: EVERY * parts]
    for field in ("iteration", "consumed_samples", "lr"):
        assert [row[field] for row in rows] == [row[field] for row in expected]
    for field in ("loss", "grad_norm"):
        assert [row[field] for row in rows] == pytest.approx([row[field] for row in expected], rel=1e-5)


def test_clipper_and_average_went_on(runs: dict[str, Path]) -> None:
    found, expected = (load_state(find_checkpoint(runs[name])) for name in ("worlds", "single"))
    assert found["ema"] == expected["ema"] and found["ema"]["updates"] == EVERY * len(WORLDS)
    for field, value in expected["clipper"].items():
        assert found["clipper"][field] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
