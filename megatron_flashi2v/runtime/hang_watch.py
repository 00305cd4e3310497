"""Ends a job that makes no progress, and shows the position of each of its processes.

Every rank watches itself: a thread notices when the main thread has begun no new phase for too long. The ranks wait for
one another in every iteration, so when one hangs, all do, and all notice. No rank needs the network for it, which may
be what hangs, nor a reply of a stopped rank: another rank of its host takes its stacks.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_flashi2v.config.train import SLOW_PHASES
from megatron_flashi2v.runtime.files import atomic_write_text
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.stacks import OwnStacks, Process, RankReport, main_thread_position, summary

HANG_EXIT_CODE = 124
"""As of ``timeout``."""
SLOW = SLOW_PHASES
"""Allowance of long phases: starting, saving, leaving."""
STACKS_FOLDER = "stacks"
SUMMARY_NAME = "summary.txt"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Phase:
    """A phase of the main thread; ``point`` counts the phases, which are the same on all ranks."""

    point: int
    name: str
    allowance: float
    limit_s: float


class HangWatch:
    """Ends this process, with :data:`HANG_EXIT_CODE`, when its context calls :meth:`enter` too late.

    First writes the stacks of all ranks to ``stacks/rank_00000.txt`` and so on, and names the ranks that the others
    wait for in a line on standard error, within twice the allowed time. Counts only time in which this process ran: a
    job or a machine that is suspended as a whole does not hang.

    All ranks enter the same phases in the same order; work of one rank alone belongs to a phase of all.

    Args:
        timeout_s: limit of a phase in seconds (``config.rules.hang_timeout_s``); 0 watches nothing.
        folder: ``--save``, on a file system that all hosts share; without it each host writes to a local disk.
        launch: this process's place.
        gather: gives all ranks the JSON-ready value of each (``parallel.agreement.gather_json``).
    """

    def __init__(
        self,
        timeout_s: float,
        folder: Path | None,
        launch: LaunchEnvironment,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self._timeout_s, self._folder = timeout_s, folder
        self._rank, self._world_size, self._gather = launch.rank, launch.world_size, gather
        self._phase = _Phase(0, "", 1.0, timeout_s)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, name: str, allowance: float = 1.0) -> None:
        """Begin a phase and end the one before.

        Args:
            name: such as "iteration 12".
            allowance: limit of the phase in timeouts. The next phase may take as long: other ranks may still be
                finishing this one.
        """
        before = self._phase
        self._phase = _Phase(before.point + 1, name, allowance, self._timeout_s * max(allowance, before.allowance))

    def __enter__(self) -> HangWatch:
        if not self._timeout_s:
            return self
        self._stacks = OwnStacks()
        own = self._stacks.process(self._rank)
        self._processes = [Process(**fields) for fields in self._gather(asdict(own))]
        self._own = own
        first = self._processes[0]
        self._run = f"{first.host}:{first.pid}:{first.started}"
        self._folder = (
            Path(tempfile.gettempdir()) / f"flashi2v-stacks-{first.pid}-{first.started}" if self._folder is None
            else self._folder / STACKS_FOLDER
        )
        self.enter("the start", SLOW)
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._stacks.close()

    def _watch(self) -> None:
        pause = min(self._timeout_s / 20, 5.0)
        seen, idle_s, last = self._phase, 0.0, time.monotonic()
        while not self._stop.wait(pause):
            now, phase = time.monotonic(), self._phase
            # A pause that took much longer means that this process was stopped or starved.
            idle_s = idle_s + min(now - last, 2 * pause) if phase is seen else 0.0
            seen, last = phase, now
            if idle_s > phase.limit_s:
                self._give_up(phase)

    def _give_up(self, phase: _Phase) -> None:
        """Write the stacks, name the late ranks, and end this process, whatever fails."""
        # Ends the process even if the file system hangs too; this needs no interpreter.
        faulthandler.dump_traceback_later(0.85 * self._timeout_s, exit=True, file=2)
        try:
            self._report(phase)
        except Exception:
            logger.critical("no progress in %s for %g s, and the stacks cannot be written", phase.name, phase.limit_s,
                            exc_info=True)
            faulthandler.dump_traceback(file=2)
        finally:
            os._exit(HANG_EXIT_CODE)

    def _report(self, phase: _Phase) -> None:
        patience_s = min(self._timeout_s / 4, 15.0)
        where, waits = main_thread_position()
        self._write(RankReport(run=self._run, process=self._own, point=phase.point, phase=phase.name, where=where,
                           waits=waits), self._stacks.dump())
        host = [process for process in self._processes if process.host == self._own.host]
        self._wait(lambda: len(self._reports(host)) == len(host), patience_s)
        speaks_for_host = self._is_first_of(self._reports(host))
        silent = []
        if speaks_for_host:
            silent = [process for process in host if process.rank not in self._reports(host)]
            for process in silent:
                report = RankReport(run=self._run, process=process, silent=f"did not answer, and {process.state}")
                self._write(report, process.dump(min(self._timeout_s / 8 / len(silent), 2.0)))
        self._wait(lambda: len(self._reports(self._processes)) == self._world_size, patience_s)
        reports = self._reports(self._processes)
        summary_file = self._folder_of_run() / SUMMARY_NAME
        if self._is_first_of(reports):
            line = (f"no progress in {phase.name} for {phase.limit_s:g} s (--hang-timeout-s {self._timeout_s:g}): "
                    f"{summary(reports, self._world_size)}; all stacks are in {summary_file.parent}")
            logger.critical("%s", line)
            atomic_write_text(summary_file, f"{self._run}\n{line}\n")
        else:  # a launcher stops all processes when one has ended
            self._wait(
                lambda: summary_file.exists() and summary_file.read_text().startswith(self._run), patience_s / 2
            )
        if speaks_for_host:
            for process in silent:
                process.kill()

    def _is_first_of(self, reports: dict[int, RankReport]) -> bool:
        """Whether this rank is the first of those that reported themselves."""
        return self._rank == min(rank for rank, report in reports.items() if report.silent is None)

    def _reports(self, processes: Iterable[Process]) -> dict[int, RankReport]:
        found = ((process.rank, RankReport.read(self._file(process.rank), self._run)) for process in processes)
        return {rank: report for rank, report in found if report is not None}

    def _write(self, report: RankReport, stacks: str) -> None:
        path = self._file(report.process.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, report.to_text(stacks))

    def _file(self, rank: int) -> Path:
        return self._folder_of_run() / f"rank_{rank:05d}.txt"

    def _folder_of_run(self) -> Path:
        assert self._folder is not None
        return self._folder

    def _wait(self, over: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not over() and time.monotonic() < end:
            time.sleep(seconds / 50)
