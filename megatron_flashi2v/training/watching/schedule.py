"""Iterations after which an observer has long work to do."""

from __future__ import annotations

import torch
import torch.distributed


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


def word_of_rank_0(number: int, device: torch.device) -> int:
    """Rank 0's number, on every rank: what it finds in files that are its own; collective.

    Args:
        number: of this rank.
        device: where the default group's backend wants tensors.
    """
    word = torch.tensor([number], dtype=torch.int64, device=device)
    torch.distributed.broadcast(word, 0)
    return int(word)
