"""Commands of ``flashi2v``: several at a time, each resumes by itself, and what it says goes into a log."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_flashi2v.config.errors import ConfigError, UserError
from megatron_flashi2v.runtime.files import read_jsonl
from paradigms.ledger import Task

FLASHI2V = (sys.executable, "-m", "megatron_flashi2v")
"""Words that start ``flashi2v`` as one process."""
UNFINISHED = 75
"""Exit code of a training that was stopped before its end."""
GRACE_S = 120.0
"""A training that is told to stop saves first."""


class Running:
    """The commands under way, by their tasks."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, task: Task) -> None:
        """Start a task's command; what it says is added to its log.

        Raises:
            ConfigError: no such program.
        """
        if task.run is not None:
            task.run()
        assert task.log is not None, "of every task with a command"
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("a") as log:
            try:
                process = subprocess.Popen(task.command, stdout=log, stderr=subprocess.STDOUT)
            except OSError as error:
                raise ConfigError(f"{task.key}: {task.command[0]} cannot be started ({error.strerror})") from error
        self.tasks.append(task)
        self._processes.append(process)

    def ended(self) -> list[tuple[Task, int]]:
        """Tasks whose command has ended since the last call, with its exit code."""
        codes = [process.poll() for process in self._processes]
        found = [(task, code) for task, code in zip(self.tasks, codes, strict=True) if code is not None]
        self.tasks = [task for task, code in zip(self.tasks, codes, strict=True) if code is None]
        self._processes = [process for process, code in zip(self._processes, codes, strict=True) if code is None]
        return found

    def stop(self) -> None:
        """Tell all to stop, and wait: trainings save first, and a second driver must not meet them."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def running() -> Iterator[Running]:
    """Commands that do not outlive the block."""
    commands = Running()
    try:
        yield commands
    finally:
        commands.stop()


def failure(task: Task, code: int) -> UserError:
    """What a command that failed said last, and where the rest is."""
    assert task.log is not None, "of every task with a command"
    said = task.log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    return UserError(f"{task.key}: exit code {code}: {said[0].strip()} (all of it stands in {task.log})")


def iterations_done(folder: Path) -> int:
    """Of a training that may not have begun."""
    metrics = folder / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []
    return int(rows[-1]["iteration"]) if rows else 0


def checkpoint_of(folder: Path, iteration: int) -> Path:
    """The checkpoint of a training at an iteration."""
    return folder / f"iter_{iteration:07d}"


def words_of(command: Sequence[object]) -> tuple[str, ...]:
    """A command's words."""
    return tuple(map(str, command))
