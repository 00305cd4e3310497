"""Bad samples in a run: filled, recorded, the same after a resume, and too many of them stop it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.damage import spoil_bytes, spoil_values
from helpers.layouts import metrics
from helpers.synthetic_data import write_synthetic
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

from megatron_flashi2v.config.errors import DataError, WriteError
from megatron_flashi2v.data.blend import BadPosition
from megatron_flashi2v.training import metrics as files_metrics
from megatron_flashi2v.training.bad_samples import _require_agreement

Train = Callable[..., int]


@pytest.fixture
def spoilt(synthetic_data: Path, tmp_path: Path) -> Path:
    """Two of six samples are bad."""
    folder = tmp_path / "spoilt"
    shutil.copytree(synthetic_data, folder)
    spoil_bytes(folder, 1)
    spoil_values(folder, 4, lambda latents: latents * float("inf"))
    return folder


def rows_of(save: Path) -> list[dict]:
    path = save / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_run_goes_on_and_records_them(train: Train, spoilt: Path, tmp_path: Path) -> None:
    assert train("--data-path", spoilt, "--save", tmp_path / "run", "--max-bad-samples", 2) == 0
    rows = rows_of(tmp_path / "run")
    assert {row["key"] for row in rows} == {"synthetic-000001", "synthetic-000004"}
    positions = [row["position"] for row in rows]
    assert positions == sorted(positions) and set(positions) <= set(range(16)) and len(positions) >= 4
    assert all(set(row) == {"position", "dataset", "key", "reason", "damaged"} for row in rows)
    assert len(metrics(tmp_path / "run")) == 4


def test_a_full_disk_costs_no_run(
    train: Train, spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--data-path", spoilt, "--max-bad-samples", 2)
    assert train("--save", tmp_path / "whole", *flags) == 0
    write, refused = files_metrics.append_jsonl, []

    def full(path: Path, row: dict) -> None:
        if path.name == "bad_samples.jsonl" and len(refused) < 2:
            refused.append(row)
            raise WriteError(f"{path}: the disk is full")
        write(path, row)

    monkeypatch.setattr(files_metrics, "append_jsonl", full)
    assert train("--save", tmp_path / "full", *flags) == 0
    assert len(refused) == 2 and rows_of(tmp_path / "full") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("half", [1, 2, 3])
def test_a_resumed_run_fills_and_records_the_same(train: Train, spoilt: Path, tmp_path: Path, half: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--data-path", spoilt, "--max-bad-samples", 2)
    assert train(*flags, "--save", whole) == 0
    assert train(*flags, "--save", parts, "--exit-interval", half) == 0
    with (parts / "bad_samples.jsonl").open("a") as file:  # met after the checkpoint, by a run that was killed
        file.write(json.dumps({"position": 15, "dataset": "x", "key": "y", "reason": "z", "damaged": True}) + "\n")
    assert train(*flags, "--save", parts, "--load", parts) == 0
    assert rows_of(parts) == rows_of(whole)
    assert [row["loss"] for row in metrics(parts)] == [row["loss"] for row in metrics(whole)]


@pytest.mark.parametrize("limit", [0, 1])
def test_too_many_stop_the_run_before_its_weights_change(
    train: Train, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    save = tmp_path / "run"
    assert train("--data-path", spoilt, "--save", save, "--save-interval", 1, "--max-bad-samples", limit) == 1
    error = capsys.readouterr().err.split("flashi2v train: error: ")[1]
    rows = rows_of(save)
    first, last = rows[0], rows[-1]
    assert error.count("\n") == 1
    assert f"--max-bad-samples allows {limit}" in error and f"position {first['position']}:" in error
    assert first["key"] in error and first["reason"] in error
    done = len(metrics(save)) if (save / "metrics.jsonl").exists() else 0
    assert done == last["position"] // 4  # the iteration that met too many is not done
    # A higher limit goes on from there.
    assert train("--data-path", spoilt, "--save", save, "--load", save, "--max-bad-samples", 2) == 0
    assert [row["iteration"] for row in metrics(save)] == [1, 2, 3, 4]


def test_what_a_run_before_met_counts(
    train: Train, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save, flags = tmp_path / "run", ("--data-path", spoilt, "--train-iters", 8)
    assert train(*flags, "--save", save, "--exit-interval", 2) == 0
    rows = rows_of(save)
    assert len({row["key"] for row in rows}) == 2
    assert train(*flags, "--save", save, "--load", save, "--max-bad-samples", 1) == 1
    error = capsys.readouterr().err
    assert "2 bad samples were met" in error and f"at position {rows[0]['position']}: " in error
    assert len(metrics(save)) == 2  # refused before it goes on


def test_a_blend_trains(train: Train, synthetic_data: Path, tmp_path: Path) -> None:
    other = write_synthetic(tmp_path / "other", 3, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=9)
    wide = write_synthetic(tmp_path / "wide", 3, (4, 2, 4, 8), TEXT_DIM, TEXT_LENGTH, seed=9)
    blend = ("--data-path", 0.5, synthetic_data, 0.25, other, 0.25, wide)
    assert train(*blend, "--save", tmp_path / "one", "--train-iters", 6) == 0
    assert train(*blend, "--save", tmp_path / "two", "--train-iters", 6, "--exit-interval", 3) == 0
    assert train(*blend, "--save", tmp_path / "two", "--load", tmp_path / "two", "--train-iters", 6) == 0
    assert [row["loss"] for row in metrics(tmp_path / "two")] == [row["loss"] for row in metrics(tmp_path / "one")]
    recipe = tmp_path / "one" / "config.yaml"
    assert train("--config", recipe, *blend, "--dry-run") == 0


def test_ranks_of_a_replica_that_read_other_bytes_stop() -> None:
    row = BadPosition(position=7, dataset="d", key="k", reason="d: cannot be read", damaged=True).to_json()
    good, bad = {"replica": 0, "reads": True, "rows": []}, {"replica": 0, "reads": True, "rows": [row]}
    other, silent = {**good, "replica": 1}, {**good, "reads": False}
    _require_agreement([bad, bad, silent, other])
    for reports, rank in (([good, bad], 1), ([bad, silent, good], 0), ([other, good, bad], 2)):
        with pytest.raises(DataError, match=f"rank {rank} could not use sample k at position 7"):
            _require_agreement(reports)
