"""What is done: each finished task with the settings that decided its result, so that a run goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object

LEDGER_FILE = "paradigms.json"
KIND = "megatron_flashi2v-paradigms"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work that is done as a whole.

    Attributes:
        stage: that it belongs to.
        key: its name, unique in the run.
        settings: all that decides its result, JSON-ready.
        run: does it, and may be called again after a kill.
        is_cheap: where settings have changed, it is done again, instead of refused.
    """

    stage: str
    key: str
    settings: dict[str, Any]
    run: Callable[[], None]
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
        elif folder.is_dir() and any(folder.iterdir()):
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


def start_over(folder: Path) -> None:
    """Remove a run of ours.

    Raises:
        DataError: the folder holds other files.
    """
    if folder.exists():
        Ledger(folder)
        shutil.rmtree(folder)
