"""Reasons to save and leave before the last iteration: signals, and a limit on the run's time."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.parallel.agreement import sum_counts
from megatron_flashi2v.runtime.hang_watch import SLOW, HangWatch

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM on preemption, SIGUSR1 by ``sbatch --signal``, SIGINT by Ctrl-C: ask for a checkpoint and the end."""


class Interrupts:
    """Collects what asks this rank to stop; within the context signals do not end the process, but are remembered.

    A second Ctrl-C ends it at once.

    One rank's reason is enough: ranks exchange :meth:`counts` with the loss of each iteration, and decide by the sums.

    Args:
        minutes: how long the run may last, from now; None is without limit.

    Attributes:
        agreed: why all ranks leave, once they know; None while they go on.
    """

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._received: set[int] = set()
        self._before: dict[int, Any] = {}
        self.agreed: str | None = None
        self._reasons = (
            *(f"{number.name} was received" for number in SIGNALS),
            f"the {minutes} minutes of --exit-duration-minutes are over",
        )

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Exception) and not isinstance(error, UserError) and signal.SIGTERM in self._received:
            # Most often another rank died and the launcher stops the rest, which wait for it in a collective: there
            # is nothing to save with, and the launcher waits.
            logger.warning("stopped by SIGTERM, and could not save before: %s", (str(error).splitlines() or [""])[0])
            raise SystemExit(128 + signal.SIGTERM) from error

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a checkpoint
        self._received.add(number)

    def counts(self) -> tuple[int, ...]:
        """For each possible reason, whether this rank has it: 0 or 1."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return (*(int(number in self._received) for number in SIGNALS), int(late))

    def settle(self, totals: Sequence[int]) -> None:
        """Set :attr:`agreed` from the sums of all ranks' :meth:`counts`."""
        found = (reason for reason, total in zip(self._reasons, totals, strict=True) if total)
        self.agreed = self.agreed or next(found, None)


class LongWork:
    """Guards work between two iterations that takes long: it is done in parts, between which a run may leave.

    Args:
        interrupts: this rank's.
        hang_watch: each part is a phase of it.
    """

    def __init__(self, interrupts: Interrupts, hang_watch: HangWatch) -> None:
        self._interrupts, self._hang_watch = interrupts, hang_watch

    def begin_part(self, doing: str) -> bool:
        """Begin another part; False, on all ranks alike, where one of them was asked to leave. Collective."""
        self._hang_watch.enter(doing, SLOW)
        self._interrupts.settle(sum_counts(self._interrupts.counts()))
        return self._interrupts.agreed is None
