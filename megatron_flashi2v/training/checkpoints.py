"""When a run's state is saved; how it is written is the saver's."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_flashi2v.checkpoint.folders import iteration_folder
from megatron_flashi2v.config.train import CheckpointArguments
from megatron_flashi2v.runtime.hang_watch import SLOW, HangWatch
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.training.saver import CheckpointSaver
from megatron_flashi2v.training.state import TrainState

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves a run's state when it is due; all ranks decide alike.

    Args:
        arguments: where to, and after how many iterations.
        state: of this rank.
        saver: writes checkpoints.
        hang_watch: enters a phase for each save.
    """

    def __init__(
        self, arguments: CheckpointArguments, state: TrainState, saver: CheckpointSaver, hang_watch: HangWatch
    ) -> None:
        self._folder, self._interval = arguments.save, arguments.save_interval
        self._state, self._saver, self._hang_watch = state, saver, hang_watch
        self._due, self._saved_at = False, -1

    def save_if_due(self, *, last: bool) -> None:
        """Save where --save-interval or the end of the run asks for it, and the present iteration is not saved yet.

        Raises:
            StorageError: as for :meth:`save`.
        """
        self._due = self._due or self._state.is_multiple_of(self._interval)
        # Skipped updates may mean spoiled weights: then the newest checkpoint stays the good one.
        due = last or (self._due and not self._state.guard.streak)
        if due and self._folder is not None and self._saved_at != self._state.iteration:
            self.save(last=last)

    def save(self, *, last: bool) -> None:
        """Write a checkpoint of the present iteration, or begin to, if it is not the run's last and --async-save is on.

        Raises:
            StorageError: on all ranks: a disk is full or refuses, and it is the last; one in between costs a warning.
        """
        state, streak = self._state, self._state.guard.streak
        self._hang_watch.enter(f"saving iteration {state.iteration}", SLOW)
        state.settle_weights()
        if streak:
            logger.warning("the last %d updates were skipped: the weights are still those of iteration %d",
                           streak, state.iteration - streak, extra=AGREED)
        # Weights that may be spoiled must not cost older ones.
        self._saver.save(state.iteration, state.pieces(), state.to_json(), last=last, delete_older=not streak)
        self._due, self._saved_at = False, state.iteration

    @property
    def published(self) -> Path | None:
        """The present iteration's checkpoint, if it is there."""
        folder = None if self._folder is None else self._folder / iteration_folder(self._state.iteration)
        return folder if folder is not None and folder.exists() else None

    def way_back(self) -> str:
        """How to go on after leaving, for the log; empty where nothing was saved."""
        return "" if self.published is None else f"; the same command goes on from {self.published}"
