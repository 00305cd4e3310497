"""What a run reports: one JSON line per iteration, and a progress line for people."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import WriteError
from megatron_flashi2v.runtime.files import append_jsonl, atomic_write_text, read_jsonl

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class IterationMetrics:
    """One row of metrics.jsonl.

    Attributes:
        iteration: counted from 1.
        consumed_samples: positions of the global order consumed after it.
        loss: mean over the global batch; null in the file where it is not finite.
        grad_norm: global L2 norm before clipping; null in the file where it is not finite.
        lr: learning rate that the update used.
        step_time_s: seconds from reading the first microbatch to the updated weights.
        skipped: why the update was not applied (see ``training.guard``); in the file only where it was not.
    """

    iteration: int
    consumed_samples: int
    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    skipped: str | None = None

    def to_row(self) -> dict[str, Any]:
        """The row; JSON knows neither NaN nor infinity."""
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        if self.skipped is None:
            del row["skipped"]
        return row


class MetricsLog:
    """Appends to ``metrics.jsonl``; a resume drops the rows past the iteration that it loaded.

    Args:
        folder: where the file lies; None keeps nothing.
        resumed_iteration: rows of later iterations are dropped, and so is a torn last line.
    """

    def __init__(self, folder: Path | None, resumed_iteration: int) -> None:
        self.path = None if folder is None else folder / METRICS_FILE
        self._waiting: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            rows = [row for row in read_jsonl(self.path) if row["iteration"] <= resumed_iteration]
            atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, metrics: IterationMetrics) -> None:
        """Write one row; floats keep full precision.

        Where the disk is full the row waits for the next one, so that a run outlives it.
        """
        if self.path is None:
            return
        self._waiting.append(metrics.to_row())
        try:
            while self._waiting:
                append_jsonl(self.path, self._waiting[0])
                self._waiting.pop(0)
        except WriteError as error:
            if len(self._waiting) == 1:
                logger.warning("%s; its rows are kept in memory meanwhile", error)


class ProgressLine:
    """Logs loss, rate and time left every ``interval`` iterations.

    Args:
        train_iters: the run's length.
        interval: iterations between lines.
    """

    def __init__(self, train_iters: int, interval: int) -> None:
        self.train_iters, self.interval = train_iters, interval
        self._since, self._iterations, self._samples = time.perf_counter(), 0, 0

    def update(self, metrics: IterationMetrics, batch_size: int) -> None:
        """Count an iteration of ``batch_size`` samples, and log if it is time."""
        self._iterations += 1
        self._samples += batch_size
        last = metrics.iteration == self.train_iters
        if metrics.iteration % self.interval and not last:
            return
        seconds = max(time.perf_counter() - self._since, 1e-9)
        left = (self.train_iters - metrics.iteration) * seconds / self._iterations
        logger.info(
            "iteration %*d/%d | loss %.4f | grad norm %.3f | lr %.2e | %.2f samples/s | %.2f s/iteration | %s left",
            len(str(self.train_iters)), metrics.iteration, self.train_iters, metrics.loss, metrics.grad_norm,
            metrics.lr, self._samples / seconds, seconds / self._iterations, clock(left),
        )
        self._since, self._iterations, self._samples = time.perf_counter(), 0, 0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
