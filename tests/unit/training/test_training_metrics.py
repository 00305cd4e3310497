"""metrics.jsonl: full precision, one row an iteration, and what a resume leaves of it; the progress line."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.training import metrics
from megatron_flashi2v.training.metrics import METRICS_FILE, IterationMetrics, MetricsLog, ProgressLine, clock
from megatron_flashi2v.training.watching.observer import Row
from megatron_flashi2v.training.watching.throughput import Throughput


def row(iteration: int, loss: float = 1.0, **throughput: float | None) -> Row:
    rates = {"samples_per_s": 8.0, "tokens_per_s": 800.0, "tflops": 3.0, "mfu": None, "data_wait_s": 0.0,
             "memory_gb": 1.5, **throughput}
    figures = IterationMetrics(
        iteration=iteration, consumed_samples=4 * iteration, loss=loss, grad_norm=2.0, lr=1e-4, step_time_s=0.5,
        loss_by_sigma=(None, loss), samples_by_sigma=(0, 4),
    )
    return {**figures.to_row(), **asdict(Throughput(**rates))}


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def write(folder: Path, iterations: int) -> Path:
    log = MetricsLog(folder, 0)
    for iteration in range(1, iterations + 1):
        log.append(row(iteration))
    return folder / METRICS_FILE


def test_rows_hold_the_agreed_keys_in_full_precision(tmp_path: Path) -> None:
    loss = 0.1 + 0.2
    MetricsLog(tmp_path / "new", 0).append(row(3, loss))
    (stored,) = read(tmp_path / "new")
    assert stored.keys() == {
        "iteration", "consumed_samples", "loss", "grad_norm", "lr", "step_time_s", "samples_per_s", "tokens_per_s",
        "tflops", "mfu", "data_wait_s", "memory_gb", "loss_by_sigma", "samples_by_sigma",
    }
    assert stored["loss"] == loss and stored["consumed_samples"] == 12
    assert stored["loss_by_sigma"] == [None, loss] and stored["samples_by_sigma"] == [0, 4]


def test_what_json_has_no_word_for_becomes_null(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0).append({"iteration": 1, "a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf, "e": 2}})
    assert read(tmp_path) == [{"iteration": 1, "a": None, "b": [1.0, None], "c": {"d": None, "e": 2}}]


def test_resume_drops_the_rows_past_the_loaded_iteration(tmp_path: Path) -> None:
    write(tmp_path, 5)
    log = MetricsLog(tmp_path, 2)
    assert [entry["iteration"] for entry in read(tmp_path)] == [1, 2]
    log.append(row(3, 9.0))
    assert [(entry["iteration"], entry["loss"]) for entry in read(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_a_fresh_start_drops_an_earlier_runs_rows(tmp_path: Path) -> None:
    write(tmp_path, 3)
    MetricsLog(tmp_path, 0)
    assert read(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"iteration": 4, "lo', "{", '{"iteration": 4, "loss": 1.0'])
def test_a_torn_last_line_is_survived(tmp_path: Path, torn: str) -> None:
    path = write(tmp_path, 3)
    with path.open("a") as file:
        file.write(torn)
    MetricsLog(tmp_path, 3).append(row(4))
    assert [entry["iteration"] for entry in read(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_earlier_line_is_refused_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "???", lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        MetricsLog(tmp_path, 3)
    assert path.read_text().splitlines()[1] == "???"  # and left as it is


def test_no_folder_keeps_nothing() -> None:
    MetricsLog(None, 0).append(row(1))


def progress_lines(caplog: pytest.LogCaptureFixture, progress: ProgressLine, rows: list[Row]) -> list[str]:
    with caplog.at_level(logging.INFO, logger="megatron_flashi2v"):
        for figures in rows:
            progress.after_iteration(figures)
    return [record.getMessage() for record in caplog.records]


def test_progress_line_comes_every_interval_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    progress = ProgressLine(train_iters=7, interval=3)
    lines = progress_lines(caplog, progress, [row(iteration, loss=0.25) for iteration in range(1, 8)])
    assert [line.split("|")[0].strip() for line in lines] == ["iteration 3/7", "iteration 6/7", "iteration 7/7"]
    assert all("loss 0.2500" in line and "samples/s" in line for line in lines)
    assert lines[-1].endswith("0:00:00 left")


def test_progress_line_tells_rates_over_all_of_the_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two iterations of half a second each in four seconds of the clock: a quarter of each iteration's own rates."""
    now = [10.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    progress = ProgressLine(train_iters=4, interval=2)
    now[0] += 4.0
    first = [row(1, mfu=0.5, tflops=400.0), row(2, mfu=0.5, tflops=400.0)]
    (line,) = progress_lines(caplog, progress, first)
    assert "| 2.00 samples/s | 200 tokens/s | 100 TFLOP/s (12.5% MFU) | 2.00 s/iteration | 0:00:04 left" in line
    now[0] += 1.0
    lines = progress_lines(caplog, progress, [row(3, data_wait_s=0.1), row(4)])
    assert "| 8.00 samples/s | 800 tokens/s | 3 TFLOP/s | 0.50 s/iteration | 10% of it waiting for data |" in lines[1]


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00:00"), (61, "0:01:01"), (3599.6, "1:00:00"), (90061, "25:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
