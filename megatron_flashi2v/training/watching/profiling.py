"""Profiler traces of a few iterations, planned by flags or asked for while the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_flashi2v.config.watch import WatchArguments
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.training.watching.observer import Observer, Row

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

REQUEST_FILE = "profile"
"""``touch SAVE/profile`` asks for a trace of the next iterations; rank 0 looks for the file and removes it."""
TRACE_FOLDER = "traces"

logger = logging.getLogger(__name__)


class Profiling(Observer):
    """Starts and stops the profiler at the same iterations on all ranks that trace.

    Args:
        arguments: which iterations and ranks.
        save: ``--save``; None traces nothing.
        device: has the profiler.
        rank: this one.
    """

    def __init__(self, arguments: WatchArguments, save: Path | None, device: Device, rank: int) -> None:
        self._arguments, self._save, self._device, self._rank = arguments, save, device, rank
        self._listens = rank == 0 and save is not None
        self._running: Any = None
        self._first, self._last = 0, -1  # iterations of the trace that is planned or under way
        self._done, self._asked = 0, False

    def before_iteration(self, state: TrainState) -> None:
        """Begin a trace where one is due."""
        arguments, done = self._arguments, state.iteration
        planned = arguments.profile and arguments.profile_step_start <= done < arguments.profile_step_end
        if planned and done >= self._last:
            self._first, self._last = done + 1, arguments.profile_step_end
        if done + 1 == self._first and self._save is not None and self._rank in arguments.profile_ranks:
            try:
                self._running = self._device.profiler()
                self._running.start()
            except Exception as error:  # of the device's tools
                self._give_up(error)

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Whether someone asks this rank for a trace: 0 or 1. Rank 0 is asked, and tells all others."""
        return {"asked": (int(self._listens and self._request.exists()),)}

    def gradients_ready(self, state: TrainState, totals: Mapping[str, Sequence[int]]) -> None:
        """Hear whether a trace is asked for."""
        self._asked = any(totals["asked"])

    def after_iteration(self, row: Row) -> None:
        """Write the trace if it is complete, and plan the one that is asked for."""
        self._done = row["iteration"]
        if self._running is not None:
            if self._done >= self._last:
                self._write()
            else:
                self._mark()
        if self._asked:
            self._plan()

    def close(self) -> None:
        """Write the trace that is under way, if there is one."""
        if self._running is not None:
            self._write()

    def _mark(self) -> None:
        """End an iteration in the trace, ``ProfilerStep#N`` counted from 0: tools that read traces look for it."""
        try:
            self._running.step()
        except Exception as error:  # of the device's tools
            self._give_up(error)

    def _plan(self) -> None:
        """Trace the next iterations; a trace that is under way serves as well."""
        if self._done >= self._last:
            length = self._arguments.profile_step_end - self._arguments.profile_step_start
            self._first, self._last = self._done + 1, self._done + length
        if self._listens:
            try:
                self._request.unlink()
            except OSError as error:
                self._listens = False
                logger.warning("%s cannot be removed (%s): no more traces on demand", self._request, error.strerror)

    def _write(self) -> None:
        assert self._save is not None
        name = f"iterations_{self._first:07d}_{self._done:07d}_rank_{self._rank}.json"
        path = self._save / TRACE_FOLDER / name
        profiler, self._running = self._running, None
        try:
            profiler.stop()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of a run that was here before
            profiler.export_chrome_trace(str(path))
            if not path.exists():  # torch_npu's profiler only prints what went wrong
                raise FileNotFoundError(f"the profiler has not written {path}; what it printed says why")
            logger.info("traced iterations %d to %d: %s", self._first, self._done, path)
        except Exception as error:  # a full disk, the device's tools
            self._give_up(error)

    @property
    def _request(self) -> Path:
        assert self._save is not None
        return self._save / REQUEST_FILE

    def _give_up(self, error: Exception) -> None:
        self._running = None
        what = (str(error).splitlines() or [""])[0]
        logger.warning("no trace: %s: %s; the run goes on", type(error).__name__, what)
