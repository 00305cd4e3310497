"""Iterations after which an observer has long work to do."""

from __future__ import annotations


class Schedule:
    """Multiples of an interval, and the run's last iteration; what was done before a run was resumed is done.

    Args:
        interval: iterations.
        train_iters: the run's length.
        done_at: iteration whose work an earlier run has done; None where it has not.
    """

    def __init__(self, interval: int, train_iters: int, done_at: int | None = None) -> None:
        self._interval, self._train_iters, self._done_at = interval, train_iters, done_at

    def is_due(self, iteration: int) -> bool:
        """Whether the work is due when so many iterations are done."""
        wanted = iteration > 0 and (iteration % self._interval == 0 or iteration == self._train_iters)
        return wanted and iteration != self._done_at
