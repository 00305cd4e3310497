"""What TensorBoard's files hold, what Weights & Biases is told, and that neither can stop a run."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.layouts import metrics

from megatron_flashi2v.training.watching.writers import scalars_of

Train = Callable[..., int]


def test_rows_become_flat_figures() -> None:
    row = {"iteration": 3, "loss": 0.5, "mfu": None, "samples_by_sigma": [1] * 8, "norms": {"phi": 2},
           "loss_by_sigma": [None, 0.25, *[None] * 5, 1.5]}
    assert scalars_of(row) == {
        "loss": 0.5, "norms/phi": 2.0, "loss_by_sigma/0.125-0.250": 0.25, "loss_by_sigma/0.875-1.000": 1.5,
    }


def test_a_reason_is_a_mark_in_a_curve() -> None:
    assert scalars_of({"iteration": 2, "loss": None, "skipped": "loss_not_finite"}) == {"skipped": 1.0}


@pytest.fixture
def curves() -> Callable[[Path], dict[str, dict[int, float]]]:
    """The points of every curve in a folder, as TensorBoard shows them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder: Path) -> dict[str, dict[int, float]]:
        found = accumulators.EventAccumulator(str(folder)).Reload()
        points = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
        assert all(len({point.step for point in curve}) == len(curve) for curve in points.values())
        return {tag: {point.step: point.value for point in curve} for tag, curve in points.items()}

    return read


def test_tensorboard_shows_the_rows(
    train: Train, tmp_path: Path, curves: Callable[[Path], dict[str, dict[int, float]]]
) -> None:
    save, board = tmp_path / "run", tmp_path / "board"
    flags = ("--save", save, "--tensorboard-dir", board, "--log-norms-interval", 2)
    assert train(*flags, "--save-interval", 2, "--train-iters", 3, "--exit-interval", 3) == 0
    # goes back to iteration 2: what was shown of iteration 3 goes
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    shutil.rmtree(save / "iter_0000003")
    assert train(*flags, "--load", save) == 0
    shown, rows = curves(board), metrics(save)
    for name in ("loss", "grad_norm", "lr", "tokens_per_s"):
        assert shown[f"train/{name}"] == {row["iteration"]: pytest.approx(row[name], rel=1e-6) for row in rows}
    assert shown["train/grad_norm_by_part/phi"].keys() == {2, 4}
    by_sigma = {name: points for name, points in shown.items() if name.startswith("train/loss_by_sigma/")}
    assert sum(map(len, by_sigma.values())) == sum(mean is not None for row in rows for mean in row["loss_by_sigma"])


class FakeWandb(ModuleType):
    """Keeps what it is told; ``fails_at`` names the call that raises."""

    def __init__(self, fails_at: str = "") -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.fails_at, self.calls = fails_at, []

    def _call(self, name: str, *arguments: Any, **named: Any) -> None:
        self.calls.append((name, *arguments, named))
        if name == self.fails_at:
            raise RuntimeError("the service is away")

    def init(self, **named: Any) -> SimpleNamespace:
        self._call("init", **named)
        return SimpleNamespace(
            id=named["id"] or f"run{len(self.calls)}", log=lambda values: self._call("log", values),
            define_metric=lambda *names, **options: self._call("define_metric", *names, **options),
            finish=lambda: self._call("finish"),
        )

    def of(self, name: str) -> list[tuple]:
        return [call for call in self.calls if call[0] == name]


def test_wandb_is_told_the_rows_and_continues_its_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    flags = ("--save", tmp_path, "--wandb-project", "films")
    assert train(*flags, "--exit-interval", 2) == 0
    assert train(*flags, "--load", tmp_path) == 0
    first, second = (call[-1] for call in fake.of("init"))
    assert first["project"] == "films" and first["id"] is None and first["config"]["lr"] == 1e-2
    assert (second["id"], second["resume"]) == ("run1", "allow")
    logged = [call[1] for call in fake.of("log")]
    assert [(row["iteration"], row["train/loss"]) for row in logged] == [
        (row["iteration"], row["loss"]) for row in metrics(tmp_path)
    ]
    assert len(fake.of("finish")) == 2


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_failing_service_does_not_stop_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    fake = FakeWandb(fails_at=call)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert train("--save", tmp_path, "--wandb-project", "films") == 0
    assert len(metrics(tmp_path)) == 4 and len(fake.of(call)) == 1  # and it is left in peace then
    error = capsys.readouterr().err
    assert error.count("--wandb-project: RuntimeError: the service is away; the run goes on without it") == 1


@pytest.mark.parametrize("flags, package", [
    (("--tensorboard-dir", "board"), "tensorboard"), (("--wandb-project", "films"), "wandb"),
])
def test_a_missing_package_is_told_before_anything_is_built(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: tuple[str, str], package: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert train("--save", tmp_path / "run", *flags) == 2
    assert f"{flags[0]} {flags[1]} needs the package {package}" in (error := capsys.readouterr().err)
    assert f"pip install {package}" in error and not (tmp_path / "run").exists()
