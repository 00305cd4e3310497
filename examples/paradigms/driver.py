"""Runs the tasks of the stages in their order: those that are not done, several at a time."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch

from megatron_flashi2v.config.errors import ConfigError, UserError
from megatron_flashi2v.runtime.logging import setup_logging
from megatron_flashi2v.runtime.progress import progress
from paradigms.commands import failure, running
from paradigms.ledger import Ledger, Task, locked, start_over

logger = logging.getLogger("megatron_flashi2v.paradigms")
POLL_S = 0.5
READ_PROGRESS_S = 5.0


class Experiment(Protocol):
    """What has stages: in pixels (``stages.py``), or over video files (``files.py``)."""

    @property
    def folder(self) -> Path:
        """Of all that it makes."""

    @property
    def stages(self) -> Sequence[str]:
        """In their order."""

    def tasks(self, stage: str) -> list[Task]:
        """Of a stage."""

    def iterations_of(self, task: Task) -> tuple[int, int] | None:
        """Iterations done and in all, of a task that trains; None of any other."""


def run_stages(run: Experiment, only: Sequence[str], *, jobs: int, fresh: bool = False) -> None:
    """Do what is missing. SIGTERM stops what is under way, as Ctrl-C does.

    Args:
        run: the experiment.
        only: names of stages; all without.
        jobs: tasks at a time.
        fresh: remove what an earlier run made.

    Raises:
        UserError: a stage is unknown, a setting has changed since an earlier run, a forerunner is missing, another
            driver is at work in the folder, or a task failed; those under way beside it have ended, and are recorded.
    """
    for stage in only:
        if stage not in run.stages:
            raise ConfigError(f"--stage {stage}: no such stage; there are {', '.join(run.stages)}")
    with locked(run.folder), _sigterm_exits():
        if fresh:
            start_over(run.folder)
        _run_stages(run, only, jobs)


def _run_stages(run: Experiment, only: Sequence[str], jobs: int) -> None:
    ledger = Ledger(run.folder)
    everything = {stage: run.tasks(stage) for stage in run.stages}
    missing = {stage: ledger.missing(tasks) for stage, tasks in everything.items()}  # settings are compared first
    for number, stage in enumerate(run.stages):
        if only and stage not in only and missing[stage] and any(run.stages.index(later) > number for later in only):
            raise ConfigError(f"--stage {' '.join(only)}: stage {stage} comes before and is not done; run it first")
    for number, stage in enumerate(run.stages, start=1):
        tasks = missing[stage]
        if only and stage not in only:
            continue
        logger.info(
            "== %d/%d %s: %d of %d to do", number, len(run.stages), stage, len(tasks), len(everything[stage])
        )
        if not tasks:
            continue
        if tasks[0].command:
            _run_commands(run, ledger, stage, tasks, jobs)
        else:
            _run_calls(ledger, stage, tasks, min(jobs, len(tasks)))


def _run_commands(run: Experiment, ledger: Ledger, stage: str, tasks: Sequence[Task], jobs: int) -> None:
    """Tasks that are programs. After one has failed none is started, and those under way go on to their end."""
    waiting, failed = list(tasks), list[UserError]()
    work = {task.key: run.iterations_of(task) or (0, 1) for task in tasks}
    total, reported = sum(full for _, full in work.values()), sum(done for done, _ in work.values())
    unit = "iterations" if any(full > 1 for _, full in work.values()) else "tasks"
    ended = set[str]()
    with progress(stage, total, initial=reported, unit=unit) as report, running() as commands:
        read_at = time.monotonic()
        while commands.tasks or (waiting and not failed):
            while waiting and not failed and len(commands.tasks) < jobs:
                commands.start(waiting.pop(0))
            time.sleep(POLL_S)
            found = commands.ended()
            for task, code in found:
                if code:
                    failed.append(failure(task, code))
                    logger.error("%s", failed[-1])
                else:
                    ledger.finish(task)
                    ended.add(task.key)
            if found or time.monotonic() - read_at > READ_PROGRESS_S:
                read_at = time.monotonic()
                done = sum(
                    work[task.key][1] if task.key in ended else (run.iterations_of(task) or (0, 1))[0] for task in tasks
                )
                report.advance(max(0, done - reported))  # a resumed training begins a little before it was stopped
                reported = max(done, reported)
    if failed:
        raise failed[0]


def _run_calls(ledger: Ledger, stage: str, tasks: Sequence[Task], jobs: int) -> None:
    """Tasks that compute: one here, which tells its progress itself, or several in processes of one thread each."""
    if jobs == 1:
        for task in tasks:
            _called(task)()
            ledger.finish(task)
        return
    context = multiprocessing.get_context("spawn")
    failed = list[UserError]()
    with (
        progress(stage, len(tasks), unit="tasks") as report,
        concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_process) as pool,
    ):
        futures = {pool.submit(_called(task)): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(futures):
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    ledger.finish(futures[future])
                    report.advance()
                    continue
                if not isinstance(error, UserError):
                    raise error
                failed.append(error)
                logger.error("%s failed: %s", futures[future].key, error)
                pool.shutdown(wait=False, cancel_futures=True)  # what is under way ends first
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # results appear whole or not at all
            raise
    if failed:
        raise failed[0]


def _called(task: Task) -> Callable[[], None]:
    assert task.run is not None, "of every task without a command"
    return task.run


def _begin_process() -> None:
    torch.set_num_threads(1)
    setup_logging()


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM becomes an exception, so that what was started is stopped too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
