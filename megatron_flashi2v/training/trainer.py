"""The training loop: read, accumulate gradients, agree, judge, apply, show, save, leave."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from megatron_flashi2v.config.errors import DataError, DivergenceError
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.hang_watch import SLOW, HangWatch
from megatron_flashi2v.training.bad_samples import BadSampleLedger
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.checkpoints import RunCheckpoints
from megatron_flashi2v.training.interrupts import Interrupts
from megatron_flashi2v.training.metrics import IterationMetrics
from megatron_flashi2v.training.saver import CheckpointSaver
from megatron_flashi2v.training.state import TrainState
from megatron_flashi2v.training.step import TrainingStep
from megatron_flashi2v.training.watching.observer import Observer, Row

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """Trains from the state's iteration on; :func:`~megatron_flashi2v.training.assembly.open_trainer` makes one.

    Attributes:
        state: what is trained.
        step: forward, backward and update.
        source: reads this replica's samples.
        bad_samples: those that could not be used.
        observers: look at the run.
        checkpoints: save the state when it is due.
        saver: writes them, at once or beside training.
        interrupts: ask this rank to leave.
        hang_watch: enters a phase for each part of an iteration.
        device: what this rank runs on.
        train_iters: the run's length.
        exit_interval: iterations after whose multiples the run leaves; None runs on.
    """

    state: TrainState
    step: TrainingStep
    source: MicrobatchSource
    bad_samples: BadSampleLedger
    observers: Observer
    checkpoints: RunCheckpoints
    saver: CheckpointSaver
    interrupts: Interrupts
    hang_watch: HangWatch
    device: Device
    train_iters: int
    exit_interval: int | None

    def train(self) -> Row | None:
        """Run to ``train_iters``, or until it is time to leave; the last iteration is always saved.

        Returns:
            The last iteration's row; None where none was left to do.

        Raises:
            DivergenceError: on all ranks: too many updates had to be skipped.
            DataError: on all ranks: too many samples are bad.
            StorageError: on all ranks: the last checkpoint cannot be written; one in between only costs a warning.
        """
        for model in self.state.models:
            model.train()
        try:
            with self.interrupts:
                row = self.run_iterations()
        except BaseException:
            self.source.abandon()
            self.saver.abandon()
            raise
        self.hang_watch.enter("the end", SLOW)
        self.source.close()
        return row

    def run_iterations(self) -> Row | None:
        """The loop; arguments and errors as for :meth:`train`."""
        state, row = self.state, None
        if state.iteration >= self.train_iters:
            logger.info("nothing to do: iteration %d of %d is done", state.iteration, self.train_iters)
        self.observers.between_iterations(state)  # what an interrupted run did not come to
        stop = self.interrupts.agreed
        while stop is None and state.iteration < self.train_iters:
            row = self.run_iteration()
            self.observers.after_iteration(row)
            self.saver.reserve(state.pieces)
            stop = self.interrupts.agreed
            if stop is None and state.is_multiple_of(self.exit_interval):
                stop = "--exit-interval asks for it"
            self.checkpoints.save_if_due(last=stop is not None or state.iteration == self.train_iters)
            if stop is None:
                self.observers.between_iterations(state)
                stop = self.interrupts.agreed
                if stop is not None:
                    self.checkpoints.save_if_due(last=True)
        if stop is not None:
            self.saver.finish()
            logger.info("leaving at iteration %d: %s%s", state.iteration, stop, self.checkpoints.way_back())
        return row

    def run_iteration(self) -> Row:
        """One optimizer step; its row, to which observers add."""
        state, number = self.state, self.state.iteration + 1
        self.hang_watch.enter(f"iteration {number}")
        self.observers.before_iteration(state)
        start, lr = time.perf_counter(), state.optimizer.param_groups[0]["lr"]

        batches = self.step.batches(self.source, state.consumed_samples)
        latent_shape = self.source.data.latent_shape(state.consumed_samples)[1:]
        report = self.step.losses_and_gradients(batches, latent_shape, self.counts)
        agreed = self.step.agree(report)
        loss, grad_norm, totals = agreed.loss, agreed.grad_norm, agreed.totals

        self.hang_watch.enter(f"the update of iteration {number}")
        try:
            self.bad_samples.settle(self.source.bad, *totals["bad_samples"])
            self.observers.gradients_ready(state, totals)
            skipped = state.guard.judge(number, loss.mean, grad_norm)
        except (DataError, DivergenceError):  # on all ranks alike: they can still publish what they were saving
            self.hang_watch.enter("the last checkpoint", SLOW)
            self.saver.finish()
            raise

        if skipped is None:
            self.step.apply(grad_norm)
            if state.average is not None:
                state.average.update()
        state.advance(self.step.samples)
        self.device.synchronize()
        seconds = time.perf_counter() - start
        self.interrupts.settle(totals["interrupts"])
        if self.saver.is_saving and not any(totals["saving"]):
            self.hang_watch.enter(f"saving beside iteration {number}", SLOW)
        self.saver.advance(*totals["saving"])
        return IterationMetrics(
            iteration=number, consumed_samples=state.consumed_samples, loss=loss.mean, grad_norm=grad_norm, lr=lr,
            step_time_s=seconds, loss_by_sigma=loss.by_sigma, samples_by_sigma=loss.samples_by_sigma, skipped=skipped,
        ).to_row()

    def counts(self) -> dict[str, tuple[int, ...]]:
        """This rank's numbers that are summed over all ranks with the loss, once its microbatches were read."""
        return {
            "bad_samples": (len(self.source.bad),),
            "saving": (self.saver.working(),),
            **self.observers.counts(),
            "interrupts": self.interrupts.counts(),
        }
