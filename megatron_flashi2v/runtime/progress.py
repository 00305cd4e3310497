"""Progress of a long loop: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)


class ProgressReport:
    """Called by the loop; see :func:`progress`. This base class reports nothing."""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count finished items.

        Args:
            count: items finished since the last call.
            note: short text beside the numbers, such as ``"loss 0.693"``; None keeps the last one.
        """


class _Bar(ProgressReport):
    """A bar on a terminal."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self._bar.update(self._task, advance=count)
        if note is not None:
            self._bar.update(self._task, note=note)


class _Lines(ProgressReport):
    """A log line every few seconds, and one at the end."""

    def __init__(
        self,
        description: str,
        total: int,
        *,
        initial: int,
        unit: str,
        interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._initial = self._done = initial
        self._interval_s, self._clock = interval_s, clock
        self._began = self._last_line = clock()
        self._note = ""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self._done += count
        self._note = self._note if note is None else note
        now = self._clock()
        if now - self._last_line >= self._interval_s and self._done < self._total:
            self._last_line = now
            self._log(now)

    def close(self) -> None:
        """Log the last line, even if the loop did not reach its end."""
        self._log(self._clock())

    def _log(self, now: float) -> None:
        seconds, new = now - self._began, self._done - self._initial
        parts = [f"{self._done}/{self._total}"]
        if new and seconds > 0:
            parts.append(format_rate(new / seconds, self._unit))
            left = (self._total - self._done) * seconds / new
            parts.append(f"{timedelta(seconds=round(left))} left" if left > 0 else f"{seconds:.0f} s in all")
        if self._note:
            parts.append(self._note)
        logger.info("%s: %s", self._description, ", ".join(parts))


class _RateColumn(ProgressColumn):
    """Items per second over the last half minute."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else format_rate(speed, self._unit), style="progress.data.speed")


@contextlib.contextmanager
def progress(
    description: str,
    total: int,
    *,
    initial: int = 0,
    unit: str = "steps",
    rank: int = 0,
    console: Console | None = None,
    interval_s: float = 15.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ProgressReport]:
    """Report a loop's progress: ``with progress("train", 100) as report: ... report.advance(note="loss 1")``.

    A terminal shows a bar with the rate and the time left; a CI log gets a line every ``interval_s``.

    Args:
        description: the loop's name, in a word or two.
        total: items at the end.
        initial: items that an earlier run finished; the rate leaves them out.
        unit: plural name of an item.
        rank: ranks other than 0 report nothing.
        console: where to draw; None takes standard error. Pass the same one to ``setup_logging``.
        interval_s: seconds between two log lines if the console is no terminal.
        clock: seconds, for the log lines.
    """
    if rank != 0:
        yield ProgressReport()
        return
    console = Console(stderr=True) if console is None else console
    if not console.is_terminal:
        lines = _Lines(description, total, initial=initial, unit=unit, interval_s=interval_s, clock=clock)
        try:
            yield lines
        finally:
            lines.close()
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    with bar:
        yield _Bar(bar, bar.add_task(description, total=total, completed=initial, note=""))


def format_rate(per_second: float, unit: str) -> str:
    """``"3.20 steps/s"``, or ``"12.5 s per step"`` if a step takes longer than a second."""
    if per_second >= 1:
        return f"{per_second:.2f} {unit}/s"
    return f"{1 / per_second:.1f} s per {unit.removesuffix('s')}"
