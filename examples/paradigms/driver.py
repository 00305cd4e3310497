"""Runs the tasks of the stages in their order: those that are not done, several at a time."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_flashi2v.config.errors import ConfigError, UserError
from megatron_flashi2v.runtime.logging import setup_logging
from megatron_flashi2v.runtime.progress import progress
from paradigms.ledger import Ledger, Task, start_over

logger = logging.getLogger("megatron_flashi2v.paradigms")
POLL_S = 5.0


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
    """Do what is missing.

    Args:
        run: the experiment.
        only: names of stages; all without.
        jobs: tasks at a time.
        fresh: remove what an earlier run made.

    Raises:
        UserError: a stage is unknown, a setting has changed since an earlier run, a forerunner is missing, or a task
            failed.
    """
    for stage in only:
        if stage not in run.stages:
            raise ConfigError(f"--stage {stage}: no such stage; there are {', '.join(run.stages)}")
    if fresh:
        start_over(run.folder)
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
        if tasks:
            _run_tasks(run, ledger, stage, tasks, min(jobs, len(tasks)))


def _run_tasks(run: Experiment, ledger: Ledger, stage: str, tasks: list[Task], jobs: int) -> None:
    if len(tasks) == 1 and run.iterations_of(tasks[0]) is None:  # which tells its progress itself, or in its log
        tasks[0].run()
        ledger.finish(tasks[0])
        return
    work = [run.iterations_of(task) or (0, 1) for task in tasks]
    unit = "iterations" if any(total > 1 for _, total in work) else "tasks"
    before = sum(done for done, _ in work)
    with (
        progress(stage, sum(total for _, total in work), initial=before, unit=unit) as report,
        _pool(unit, jobs) as pool,
    ):
        futures = [pool.submit(task.run) for task in tasks]
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = concurrent.futures.wait(
                    waiting, timeout=POLL_S, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    _finish(ledger, tasks[futures.index(future)], future)
                now = sum(
                    (run.iterations_of(task) or (0, 1))[0] if future in waiting else total
                    for task, future, (_, total) in zip(tasks, futures, work, strict=True)
                )
                report.advance(now - before)
                before = now
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is under way ends first
            raise


def _finish(ledger: Ledger, task: Task, future: concurrent.futures.Future[None]) -> None:
    """Record a task, or tell at once that it failed: others may still be under way for long."""
    try:
        future.result()
    except UserError as error:
        logger.error("%s failed: %s", task.key, error)
        raise
    ledger.finish(task)


def _pool(unit: str, jobs: int) -> concurrent.futures.Executor:
    """Threads that wait for commands, or processes that compute with one thread each; one at a time computes here."""
    if unit == "iterations" or jobs == 1:
        return concurrent.futures.ThreadPoolExecutor(jobs)
    return concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_process
    )


def _begin_process() -> None:
    torch.set_num_threads(1)
    setup_logging()
