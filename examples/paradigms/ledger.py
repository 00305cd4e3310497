"""What is done: each finished task with the settings that decided its result, so that a run goes on where it was."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object

LEDGER_FILE = "paradigms.json"
LOCK_FILE = "paradigms.lock"
KIND = "megatron_flashi2v-paradigms"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work that is done as a whole.

    Attributes:
        stage: that it belongs to.
        key: its name, unique in the run.
        settings: all that decides its result, JSON-ready.
        run: does it, or what must be done before its command; may be called again after a kill.
        command: words of a program that does it, and goes on where it was when it is started again.
        log: file that takes what the command says.
        is_cheap: where settings have changed, it is done again, instead of refused.
    """

    stage: str
    key: str
    settings: dict[str, Any]
    run: Callable[[], None] | None = None
    command: tuple[str, ...] = ()
    log: Path | None = None
    is_cheap: bool = False


class Ledger:
    """The record in a run's folder.

    Args:
        folder: of the run.

    Raises:
        DataError: the folder holds files, but no record of ours; or the record is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEDGER_FILE
        self._done: dict[str, Any] = {}
        if self._path.exists():
            values = read_json_object(self._path, error=DataError)
            if values.get("kind") != KIND or not isinstance(values.get("done"), dict):
                raise DataError(f"{self._path}: no record of paradigms.sh; give another --output")
            self._done = values["done"]
        elif folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
            raise DataError(f"--output {folder}: holds other files; give a new folder")
        else:
            self._write()

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Those that are not done.

        Raises:
            ConfigError: one was done with other settings.
        """
        for task in tasks:
            recorded = self._done.get(task.key, task.settings)
            if task.is_cheap:
                continue
            for name in sorted({*recorded, *task.settings}):
                if recorded.get(name) != task.settings.get(name):
                    raise ConfigError(
                        f"{self._path}: {task.key} was made with {name} {recorded.get(name)!r}, not "
                        f"{task.settings.get(name)!r}; give another --output, or --fresh to start over"
                    )
        return [task for task in tasks if self._done.get(task.key) != task.settings]

    def finish(self, task: Task) -> None:
        """Record that a task is done."""
        self._done[task.key] = task.settings
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self._path, {"kind": KIND, "done": self._done})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second driver out of a run's folder, for as long as this process lives.

    Raises:
        ConfigError: another works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--output {folder}: another paradigms.sh is at work in it; wait, or stop it") from error
        yield


def start_over(folder: Path) -> None:
    """Remove what a run of ours made, but its lock.

    Raises:
        DataError: the folder holds other files.
    """
    if not folder.exists():
        return
    Ledger(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LEDGER_FILE, LOCK_FILE):
            path.unlink()
    (folder / LEDGER_FILE).unlink()  # last: what is half removed is still ours
