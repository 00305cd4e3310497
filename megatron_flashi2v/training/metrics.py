"""What a run reports: one JSON line per iteration, and a progress line for people."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import WriteError
from megatron_flashi2v.runtime.files import append_jsonl, atomic_write_text, read_jsonl
from megatron_flashi2v.training.watching.observer import Observer, Row

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
NOTEWORTHY_WAIT = 0.02
"""Share of the time from which on the progress line shows the wait for data."""


@dataclass(frozen=True, kw_only=True)
class IterationMetrics:
    """An iteration's figures, with which its row of metrics.jsonl begins; observers add theirs.

    Attributes:
        iteration: counted from 1.
        consumed_samples: positions of the global order consumed after it.
        loss: mean over the global batch; null in the file where it is not finite.
        grad_norm: global L2 norm before clipping; null in the file where it is not finite.
        lr: learning rate that the update used.
        step_time_s: seconds from reading the first microbatch to the updated weights.
        loss_by_sigma: mean loss of the samples in each of 8 equal parts of sigma's [0, 1]; None where it has none.
        samples_by_sigma: how many those are.
        skipped: why the update was not applied (see ``training.guard``); in the file only where it was not.
    """

    iteration: int
    consumed_samples: int
    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    loss_by_sigma: tuple[float | None, ...]
    samples_by_sigma: tuple[int, ...]
    skipped: str | None = None

    def to_row(self) -> Row:
        """The row, without ``skipped`` where the update was applied."""
        names = [field.name for field in fields(self) if field.name != "skipped" or self.skipped is not None]
        return {name: getattr(self, name) for name in names}


class RowFile:
    """A JSON-lines file to which rows are appended; where the disk is full they wait for the next, and the run goes on.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._waiting: list[dict[str, Any]] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, and those that wait."""
        if self.path is None:
            return
        self._waiting.append(dict(row))
        try:
            while self._waiting:
                append_jsonl(self.path, self._waiting[0])
                self._waiting.pop(0)
        except WriteError as error:
            if len(self._waiting) == 1:
                logger.warning("%s; its rows are kept in memory meanwhile", error)


class MetricsLog:
    """Appends rows to a JSON-lines file; a resume drops those past the iteration that it loaded.

    Args:
        folder: where the file lies; None keeps nothing.
        resumed_iteration: rows of later iterations are dropped, and so is a torn last line.
        name: the file's.

    Attributes:
        last_iteration: of the rows that an earlier run left; None where it left none.
    """

    def __init__(self, folder: Path | None, resumed_iteration: int, name: str = METRICS_FILE) -> None:
        path = None if folder is None else folder / name
        self._file = RowFile(path)
        self.last_iteration: int | None = None
        if path is not None and path.exists():
            rows = [row for row in read_jsonl(path) if row["iteration"] <= resumed_iteration]
            self.last_iteration = rows[-1]["iteration"] if rows else None
            atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; floats keep full precision, and what is not finite becomes null."""
        self._file.append(finite(row))


def finite(value: Any) -> Any:
    """The value with None for every float in it that JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressLine(Observer):
    """Logs loss, rates and time left every ``interval`` iterations; all that happens in between counts as time.

    Args:
        train_iters: the run's length.
        interval: iterations between lines.
    """

    def __init__(self, train_iters: int, interval: int) -> None:
        self.train_iters, self.interval = train_iters, interval
        self._start_anew()

    def after_iteration(self, row: Row) -> None:
        """Count an iteration, and log if it is time."""
        self._iterations += 1
        step_s = row["step_time_s"]
        self._samples += row["samples_per_s"] * step_s
        self._tokens += row["tokens_per_s"] * step_s
        self._teraflop += (row["tflops"] or 0.0) * step_s
        self._waited += row["data_wait_s"]
        last = row["iteration"] == self.train_iters
        if row["iteration"] % self.interval and not last:
            return
        seconds = max(time.perf_counter() - self._since, 1e-9)
        left = (self.train_iters - row["iteration"]) * seconds / self._iterations
        logger.info(
            "iteration %*d/%d | loss %.4f | grad norm %.3f | lr %.2e | %s | %s left",
            len(str(self.train_iters)), row["iteration"], self.train_iters, row["loss"], row["grad_norm"], row["lr"],
            " | ".join(self._rates(seconds, row)), clock(left),
        )
        self._start_anew()

    def _rates(self, seconds: float, row: Row) -> list[str]:
        """Rates over the seconds since the last line; the row tells the device's peak."""
        rates = [f"{self._samples / seconds:.2f} samples/s", f"{self._tokens / seconds:,.0f} tokens/s"]
        tflops = self._teraflop / seconds
        if row["tflops"] is None:
            pass  # weights are frozen
        elif row["mfu"] is None:
            rates.append(f"{tflops:.3g} TFLOP/s")
        else:
            rates.append(f"{tflops:.0f} TFLOP/s ({tflops * row['mfu'] / row['tflops']:.1%} MFU)")
        rates.append(f"{seconds / self._iterations:.2f} s/iteration")
        if self._waited >= NOTEWORTHY_WAIT * seconds:
            rates.append(f"{self._waited / seconds:.0%} of it waiting for data")
        return rates

    def _start_anew(self) -> None:
        self._since, self._iterations = time.perf_counter(), 0
        self._samples = self._tokens = self._teraflop = self._waited = 0.0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
