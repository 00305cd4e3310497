"""Runs that are stopped and resumed, divided otherwise or repeated from their config.yaml are the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.layouts import metrics, tensors, weights
from helpers.synthetic_data import write_synthetic
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.cli.main import main

Train = Callable[..., int]
TRACKER = "latest_checkpointed_iteration.txt"
SAME = ("iteration", "consumed_samples", "loss", "grad_norm", "lr")


def rows(save: Path) -> list[dict]:
    """The metrics without times."""
    return [{name: row[name] for name in SAME} for row in metrics(save)]


def assert_same_tensors(first: Path, second: Path) -> None:
    """Weights and optimizer state of the last checkpoints are equal, bit for bit."""
    found, expected = (tensors(find_checkpoint(save), prefix="") for save in (first, second))
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("flags", [
    ("--lr-decay-style", "cosine", "--lr-warmup-iters", "1"),
    ("--bf16", "--recompute-granularity", "full"),
    ("--optimizer", "sgd", "--clip-grad", "0.5"),
    ("--use-distributed-optimizer",),
], ids=lambda flags: flags[0])
def test_a_resumed_run_is_the_uninterrupted_one(train: Train, tmp_path: Path, flags: tuple[str, ...]) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train("--save", straight, *flags) == 0
    assert train("--save", halves, "--exit-interval", 2, *flags) == 0
    assert [row["iteration"] for row in rows(halves)] == [1, 2] and (halves / TRACKER).read_text() == "2\n"
    assert train("--save", halves, "--load", halves, *flags) == 0
    assert rows(halves) == rows(straight)
    assert len({row["loss"] for row in rows(straight)}) == 4
    assert [row["consumed_samples"] for row in rows(straight)] == [4, 8, 12, 16]
    assert_same_tensors(halves, straight)


def test_resume_drops_rows_past_the_loaded_iteration_and_a_torn_line(train: Train, tmp_path: Path) -> None:
    """As after a run that was killed in iteration 5, whose last checkpoint is of iteration 2."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train("--save", straight, "--save-interval", 2) == 0
    assert sorted(path.name for path in straight.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "iter_0000004")
    (killed / TRACKER).write_text("2\n")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "consumed_sam')
    assert train("--save", killed, "--load", killed, "--train-iters", 3) == 0
    assert rows(killed) == rows(straight)[:3]


@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_load_of_an_absent_or_empty_folder_starts_anew(train: Train, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    assert train("--save", folder, "--load", folder, "--train-iters", 2) == 0
    assert [row["iteration"] for row in rows(folder)] == [1, 2]


def test_resume_may_save_elsewhere(train: Train, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train("--save", first, "--exit-interval", 2) == 0
    before = sorted(path.name for path in first.iterdir())
    assert train("--save", second, "--load", first) == 0
    assert [row["iteration"] for row in rows(second)] == [3, 4]
    assert sorted(path.name for path in first.iterdir()) == before


def test_a_finished_run_has_nothing_left_to_do(train: Train, tmp_path: Path) -> None:
    assert train("--save", tmp_path) == 0
    before = rows(tmp_path)
    assert train("--save", tmp_path, "--load", tmp_path) == 0
    assert rows(tmp_path) == before


@pytest.mark.parametrize("size", [1, 4])
def test_microbatches_of_any_size_train_alike(train: Train, tmp_path: Path, size: int) -> None:
    assert train("--save", tmp_path / "two", "--micro-batch-size", 2) == 0
    assert train("--save", tmp_path / "other", "--micro-batch-size", size) == 0
    for row, expected in zip(rows(tmp_path / "other"), rows(tmp_path / "two"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_config_yaml_repeats_the_run(train: Train, run_command: Train, tmp_path: Path) -> None:
    flags = ("--seed", 11, "--sigma-distribution", "uniform", "--clip-grad", "0.25", "--phi-kernel", "3x3x3")
    assert train("--save", tmp_path / "run", *flags) == 0
    assert run_command("--config", tmp_path / "run" / "config.yaml", "--save", tmp_path / "again") == 0
    assert rows(tmp_path / "again") == rows(tmp_path / "run")
    first, again = ((tmp_path / name / "config.yaml").read_text().splitlines() for name in ("run", "again"))
    assert [line for line in first if line not in again] == [f"save: {tmp_path / 'run'}"]


def test_a_checkpoint_describes_its_model(train: Train, tmp_path: Path) -> None:
    assert train("--save", tmp_path, "--train-iters", 1, "--phi-order", "repeat_then_conv") == 0
    model = json.loads((tmp_path / "iter_0000001" / "model_config.json").read_text())
    assert (model["hidden_size"], model["num_attention_heads"], model["num_layers"]) == (32, 2, 2)
    assert (model["phi_order"], model["conditioning"]) == ("repeat_then_conv", "flashi2v")
    assert (model["text_length"], model["text_cleaning"]) == (6, "full")  # the data set's cleaning


def test_a_checkpoint_records_how_its_captions_were_cleaned(train: Train, tmp_path: Path) -> None:
    """Sampling cleans its prompts by what the checkpoint says."""
    data = write_synthetic(
        tmp_path / "data", 4, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3, text_cleaning="light"
    )
    assert train("--data-path", data, "--save", tmp_path / "run", "--train-iters", 1) == 0
    model = json.loads((tmp_path / "run" / "iter_0000001" / "model_config.json").read_text())
    assert model["text_cleaning"] == "light"


def test_converted_weights_start_a_run_on_captions_cleaned_otherwise(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights from elsewhere are recorded with the light cleaning that their branches sample with, data with full."""
    run, wan, flags = tmp_path / "run", tmp_path / "wan", ("--train-iters", 1, "--image-embed-dim", 1280)
    assert train("--save", run, *flags) == 0
    assert main(["convert", "--from", "megatron", str(run), "--to", "wan", str(wan)]) == 0
    (wan / "model_config.json").unlink()
    found = {}
    for name in ("beside", "within"):
        assert main(["convert", "--from", "wan", str(wan), "--to", "megatron", str(tmp_path / name)]) == 0
        model = json.loads((tmp_path / name / "iter_0000000" / "model_config.json").read_text())
        assert model["text_cleaning"] == "light"
        save = tmp_path / ("save" if name == "beside" else name)
        assert train("--load", tmp_path / name, "--save", save, *flags) == 0
        found[name] = json.loads((save / "iter_0000001" / "model_config.json").read_text())["text_cleaning"]
    assert found == {"beside": "full", "within": "full"}
    light = write_synthetic(tmp_path / "data", 4, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3, text_cleaning="light")
    capsys.readouterr()
    assert train("--data-path", light, "--load", run, "--save", tmp_path / "other", *flags) == 1
    assert "text_cleaning is full in the checkpoint, light was asked for" in capsys.readouterr().err


def test_grad_norm_is_that_before_clipping(train: Train, tmp_path: Path) -> None:
    """Plain SGD moves the weights by the rate times the clipped gradient, whose length is the limit."""
    sgd = ("--optimizer", "sgd", "--weight-decay", 0, "--train-iters", 1)
    for name, flags in {
        "still": ("--lr", 0.0), "free": ("--lr", 0.1, "--clip-grad", 0), "clipped": ("--lr", 0.1, "--clip-grad", 0.01)
    }.items():
        assert train("--save", tmp_path / name, *sgd, *flags) == 0
    norm = rows(tmp_path / "free")[0]["grad_norm"]
    assert norm > 0.1
    assert rows(tmp_path / "clipped")[0]["grad_norm"] == norm
    start = weights(tmp_path / "still")
    for name, expected in (("free", 0.1 * norm), ("clipped", 0.1 * 0.01)):
        moved = weights(tmp_path / name)
        step = torch.stack([(moved[key] - start[key]).norm() for key in start]).norm().item()
        assert step == pytest.approx(expected, rel=1e-3)
