"""`--mock-data`: samples that nobody prepared train, resume, and are the same at another layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.layouts import Layout, assert_same_metrics, assert_same_weights, metrics, run_layouts, without_times
from helpers.train_command import run_command

from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.config.recipe import from_values
from megatron_flashi2v.data.mock import MockDataset
from megatron_flashi2v.data.prepared import check_sample
from megatron_flashi2v.models.presets import PRESETS

__all__ = ["run_command"]

SIZE = ("--num-frames", "5", "--height", "32", "--width", "48")
# a recipe's data_path, which --mock-data wins over
MODEL = ("--model", "tiny", "--num-layers", "2", "--device", "cpu", "--data-path", "nowhere", "--mock-data")
FLAGS = [*MODEL, *SIZE, "--train-iters", "4", "--global-batch-size", "2", "--lr", "1e-3", "--adam-eps", "1e-5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mock")
    layouts = [
        Layout("whole", 1), Layout("half", 1, ("--exit-interval", "2")),
        Layout("rest", 1, ("--load", str(folder / "half"))),
        Layout("tp2-sp", 2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
        Layout("dp2", 2, replicas=2),
    ]
    return run_layouts(layouts, folder, FLAGS)


def test_it_trains(runs: dict[str, Path]) -> None:
    losses = [row["loss"] for row in metrics(runs["whole"])]
    assert len(set(losses)) == 4
    assert losses[0] == pytest.approx(2.0, rel=0.2)  # noise - latents of unit variance, and a head that predicts 0


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    made = {
        seed: MockDataset(from_values(EncodingConfig, {"num_frames": 5, "height": 32, "width": 48, "seed": seed}),
                          PRESETS["tiny"]).fetch([3, 1000, 3])
        for seed in (1, 2)
    }
    first, other, again = made[1]
    for name in ("latents_CTHW", "text_rows_LD"):
        tensor = getattr(first, name)
        assert torch.equal(tensor, getattr(again, name))
        assert not torch.equal(tensor, getattr(other, name)) and not torch.equal(tensor, getattr(made[2][0], name))
        assert tensor.float().std() == pytest.approx(1.0, abs=0.1)
    check_sample(first, MockDataset(from_values(EncodingConfig, {"num_frames": 5, "height": 32, "width": 48}),
                                    PRESETS["tiny"]).info, "mock")
    assert (first.key, first.latents_CTHW.shape[1:]) == ("mock-0003", (2, 4, 6))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(runs: dict[str, Path]) -> None:
    rest, whole = metrics(runs["rest"]), metrics(runs["whole"])
    assert [row["iteration"] for row in rest] == [3, 4]
    for row, want in zip(rest, whole[2:], strict=True):
        assert without_times(row) == without_times(want)


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2"])
def test_another_layout_trains_alike(runs: dict[str, Path], layout: str) -> None:
    assert_same_metrics(runs[layout], runs["whole"])
    assert_same_weights(runs[layout], runs["whole"])


@pytest.mark.parametrize("flags, said", [
    (("--online-encoding",), "--mock-data makes samples up, and --online-encoding encodes videos; give one of them"),
    (("--num-frames", "6"), "num_frames is 6"),
])
def test_flags_that_cannot_work(
    run_command: Callable[..., int], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert run_command(*MODEL, *flags) != 0
    assert said in capsys.readouterr().err


def test_a_dry_run_plans_for_the_samples_size(
    run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*MODEL, *SIZE, "--dry-run") == 0
    assert "visual_tokens: 12  # 5 frames of 32 x 48" in capsys.readouterr().out
