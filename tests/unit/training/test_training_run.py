"""``train`` from Python: what it returns, observers of a user's, and a process that is afterwards as it was before."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import metrics
from helpers.train_command import FLAGS
from megatron.core import parallel_state

from megatron_flashi2v import Observer, TrainConfig, UserError, train


@pytest.fixture
def config(synthetic_data: Path, tmp_path: Path) -> Any:
    """The small data and model, saved in a folder of its own, with further values by the flags' names."""
    values = {name.replace("-", "_"): value for name, value in FLAGS.items()}

    def config(folder: str = "run", **changes: object) -> TrainConfig:
        return TrainConfig.from_flags(**{**values, "data_path": synthetic_data, "save": tmp_path / folder, **changes})

    return config


class PrintLoss(Observer):
    def after_iteration(self, row):
        print(row["iteration"], row["loss"])


def test_an_observer_of_a_few_lines_prints_the_loss(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = train(config(), observers=[PrintLoss()])
    rows = metrics(done.checkpoint.parent)
    assert capsys.readouterr().out == "".join(f"{row['iteration']} {row['loss']}\n" for row in rows)
    assert done.iteration == 4 and done.checkpoint.name == "iter_0000004"
    assert {name: done.metrics[name] for name in ("iteration", "loss", "memory_gb")} == {
        name: rows[-1][name] for name in ("iteration", "loss", "memory_gb")
    }


def test_a_run_without_a_folder_and_one_that_is_done(config: Any, tmp_path: Path) -> None:
    assert train(config(save=None, train_iters=1)).checkpoint is None
    folder = train(config(train_iters=2)).checkpoint
    again = train(config(train_iters=2, load=tmp_path / "run"))
    assert (again.iteration, again.metrics, again.checkpoint) == (2, None, folder)


class Recorder(Observer):
    """Every call of a hook, in order; adds a figure, and counts two numbers under the name that all others use, too."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, []

    def between_iterations(self, state):
        self.calls.append(("between", state.iteration))

    def before_iteration(self, state):
        self.calls.append(("before", state.iteration))

    def counts(self):
        return {"asked": (self.number, 10 * self.number)}

    def gradients_ready(self, state, totals):
        assert list(totals) == ["asked"] and all(p.main_grad is not None for _, p in state.named_parameters())
        self.calls.append(("gradients", list(totals["asked"])))

    def after_iteration(self, row):
        self.calls.append(("after", row["iteration"], [name for name in row if name.startswith("figure")]))
        row[f"figure_{self.number}"] = row["samples_per_s"] * self.number

    def close(self):
        self.calls.append(("close",))


def test_hooks_come_in_order_with_the_observers_own_counts_and_figures(config: Any, tmp_path: Path) -> None:
    first, second = Recorder(3), Recorder(4)
    train(config(train_iters=2), observers=[first, second])
    assert first.calls == [
        ("between", 0), ("before", 0), ("gradients", [3, 30]), ("after", 1, []),
        ("between", 1), ("before", 1), ("gradients", [3, 30]), ("after", 2, []), ("between", 2), ("close",),
    ]
    assert [call for call in second.calls if call[0] in ("gradients", "after")] == [
        ("gradients", [4, 40]), ("after", 1, ["figure_3"]), ("gradients", [4, 40]), ("after", 2, ["figure_3"]),
    ]
    for row in metrics(tmp_path / "run"):
        assert row["figure_4"] == 4 * row["samples_per_s"] and list(row)[-2:] == ["figure_3", "figure_4"]


def test_what_is_no_observer_is_refused_before_anything_is_written(config: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="derive its class from megatron_flashi2v.Observer"):
        train(config(), observers=[print])
    assert not (tmp_path / "run").exists()


def surroundings() -> dict[str, Any]:
    """What a run changes in its process."""
    root, package = logging.getLogger(), logging.getLogger("megatron_flashi2v")
    return {
        "signals": {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)},
        "deterministic": (torch.are_deterministic_algorithms_enabled(),
                          torch.is_deterministic_algorithms_warn_only_enabled()),
        "handlers": list(root.handlers),
        "levels": [package.level, logging.getLogger("py.warnings").level],
        "warnings": (list(warnings.filters), warnings.showwarning),
        "process group": torch.distributed.is_initialized(),
        "megatron": parallel_state.model_parallel_is_initialized(),
        "redirected": (torch.cuda.is_available, torch.cuda.current_device, torch.empty, torch.Tensor.to),
        "threads": {thread.name for thread in threading.enumerate()} - {"read ahead"},
    }


class Fail(Observer):
    """Raises in the second iteration, in the middle of a step."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def gradients_ready(self, state, totals):
        if state.iteration == 1:
            raise self.error


FAILURES = {
    "an observer's error": ({}, RuntimeError("planted"), RuntimeError),
    "a user's error": ({}, UserError("planted"), UserError),
    "data that are not there": ({"data_path": "nowhere"}, None, UserError),
    "a layout that does not fit": ({"tensor_model_parallel_size": 2}, None, UserError),
    "a checkpoint of another model": ({"load": "LOAD"}, None, UserError),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_process_trains_again_after_a_run_that_failed(
    config: Any, tmp_path: Path, failure: str
) -> None:
    changes, planted, raised = FAILURES[failure]
    watched = {"hang_timeout_s": 600, "deterministic": True, "async_save": True, "save_interval": 1}
    before = surroundings()
    whole = train(config("whole", **watched))
    assert surroundings() == before
    if "load" in changes:
        changes = {"load": train(config("other", hidden_size=48, train_iters=1)).checkpoint}
    observers = [] if planted is None else [Fail(planted)]
    with pytest.raises(raised, match=None if planted is None else "planted"):
        train(config("failed", **watched, **changes), observers=observers)
    assert surroundings() == before
    again = train(config("again", **watched))
    assert surroundings() == before
    assert again.metrics["loss"] == whole.metrics["loss"]
    assert [row["loss"] for row in metrics(tmp_path / "again")] == [row["loss"] for row in metrics(tmp_path / "whole")]


def test_a_users_own_settings_are_kept(config: Any) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train(config(train_iters=1))
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_dry_run_is_not_trained(config: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dry-run is on"):
        train(config(dry_run=True))
    assert not (tmp_path / "run").exists()


def test_msruns_scheduler_does_not_train(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1",
                        "MS_SCHED_PORT": "8118"}.items():
        monkeypatch.setenv(name, value)
    assert train(config()).iteration == 0
