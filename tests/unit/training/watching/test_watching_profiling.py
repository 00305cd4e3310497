"""Which iterations are traced, by plan and on demand, and that a trace never stops or changes a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.layouts import metrics

from megatron_flashi2v.config.watch import WatchArguments
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.training.state import TrainState
from megatron_flashi2v.training.watching.observer import Observer
from megatron_flashi2v.training.watching.profiling import Profiling

Train = Callable[..., int]


class FakeProfiler:
    """Writes the iterations at which it was started and stopped."""

    def __init__(self, now: list[int]) -> None:
        self.now, self.span, self.marks = now, [], 0

    def start(self) -> None:
        self.span.append(self.now[0])

    def step(self) -> None:
        self.marks += 1

    def stop(self) -> None:
        self.span.append(self.now[0])
        assert self.marks in (self.span[1] - self.span[0] - 1, self.span[1] - self.span[0])  # the last may be marked

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text(json.dumps(self.span))


def run(
    save: Path, arguments: WatchArguments, *, iterations: range, rank: int = 0, requests: tuple[int, ...] = ()
) -> dict[str, list[int]]:
    """What is traced when ``SAVE/profile`` is touched during the iterations named; spans by file."""
    now, device = [0], CpuDevice()
    device.profiler = lambda: FakeProfiler(now)  # type: ignore[method-assign]
    profiling = Profiling(arguments, save, device, rank)
    for done in iterations:
        now[0], state = done, SimpleNamespace(iteration=done)
        profiling.before_iteration(state)  # type: ignore[arg-type]
        if done + 1 in requests and rank == 0:
            (save / "profile").touch()
        counts = profiling.counts()
        assert counts == {"asked": (int(done + 1 in requests and rank == 0),)}
        now[0] = done + 1
        profiling.gradients_ready(state, {"asked": [int(done + 1 in requests)]})  # type: ignore[arg-type]
        profiling.after_iteration({"iteration": done + 1})
    profiling.close()
    return {path.name: json.loads(path.read_text()) for path in (save / "traces").glob("*")}


PLANNED = WatchArguments(profile=True, profile_step_start=3, profile_step_end=5, profile_ranks=(0, 2))


def test_planned_iterations(tmp_path: Path) -> None:
    for rank in (0, 2):
        expected = {f"iterations_0000004_0000005_rank_{rank}.json": [3, 5]}
        assert run(tmp_path / str(rank), PLANNED, iterations=range(10), rank=rank) == expected
    assert run(tmp_path / "1", PLANNED, iterations=range(10), rank=1) == {}


def test_a_run_that_is_resumed_inside_the_plan_traces_the_rest(tmp_path: Path) -> None:
    assert run(tmp_path, PLANNED, iterations=range(4, 10)) == {"iterations_0000005_0000005_rank_0.json": [4, 5]}


def test_a_run_that_ends_inside_the_plan_writes_what_there_is(tmp_path: Path) -> None:
    assert run(tmp_path, PLANNED, iterations=range(4)) == {"iterations_0000004_0000004_rank_0.json": [3, 4]}


@pytest.mark.parametrize("rank", [0, 1])
def test_on_demand(tmp_path: Path, rank: int) -> None:
    arguments = WatchArguments(profile_step_end=13, profile_ranks=(0, 1))
    # the second request comes while the first trace is under way, which serves it
    found = run(tmp_path, arguments, iterations=range(12), rank=rank, requests=(2, 4, 7))
    assert found == {
        f"iterations_0000003_0000005_rank_{rank}.json": [2, 5], f"iterations_0000008_0000010_rank_{rank}.json": [7, 10],
    }
    assert not (tmp_path / "profile").exists()


def test_traces_of_a_run(train: Train, tmp_path: Path) -> None:
    """One planned and one on demand, with the attention's operators in it; the losses do not notice."""
    straight, traced = tmp_path / "straight", tmp_path / "traced"
    assert train("--save", straight, "--train-iters", 6) == 0

    class Touch(Observer):
        def before_iteration(self, state: TrainState) -> None:
            if state.iteration == 2:
                (traced / "profile").touch()

    flags = ("--train-iters", 6, "--profile", "--profile-step-start", 1, "--profile-step-end", 2)
    assert train("--save", traced, *flags, observers=[Touch()]) == 0
    assert [row["loss"] for row in metrics(traced)] == [row["loss"] for row in metrics(straight)]
    names = sorted(path.name for path in (traced / "traces").iterdir())
    assert names == ["iterations_0000002_0000002_rank_0.json", "iterations_0000004_0000004_rank_0.json"]
    assert not (traced / "profile").exists() and not (straight / "traces").exists()
    for name in names:
        events = json.loads((traced / "traces" / name).read_text())["traceEvents"]
        assert {"aten::scaled_dot_product_attention", "aten::addmm"} <= {event.get("name") for event in events}


@pytest.mark.parametrize("call", ["start", "stop", "export_chrome_trace"])
def test_a_failing_profiler_does_not_stop_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no profiler today")

    monkeypatch.setattr(FakeProfiler, call, fail)
    monkeypatch.setattr(CpuDevice, "profiler", lambda self: FakeProfiler([0]))
    assert train("--save", tmp_path, "--profile", "--profile-step-start", 1, "--profile-step-end", 2) == 0
    assert len(metrics(tmp_path)) == 4
    assert "no trace: RuntimeError: no profiler today; the run goes on" in capsys.readouterr().err


def test_a_profiler_that_writes_nothing_has_no_success_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch_npu's catches its own errors."""
    monkeypatch.setattr(FakeProfiler, "export_chrome_trace", lambda self, path: None)
    caplog.set_level("INFO", logger="megatron_flashi2v")
    assert run(tmp_path, PLANNED, iterations=range(6)) == {}
    assert "traced" not in caplog.text
    assert re.search(r"no trace: FileNotFoundError: the profiler has not written .*rank_0\.json", caplog.text)


@pytest.mark.parametrize("flags, message", [
    (("--profile",), "--profile writes its traces under --save"),
    (("--profile-step-start", 5, "--profile-step-end", 5), "must be in order"),
    (("--profile-ranks", 0, 1), "--profile-ranks names rank 1; 1 processes have 0 to 0"),
])
def test_refusals(
    train: Train, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], message: str
) -> None:
    assert train(*flags) != 0
    assert message in capsys.readouterr().err
