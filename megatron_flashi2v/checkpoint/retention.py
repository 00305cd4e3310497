"""Retention: which checkpoints a run keeps, and deleting the others."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How many checkpoints a run keeps.

    Attributes:
        last: keep this many of the newest; None keeps all.
        every: keep also the first at or after each multiple of this.
    """

    last: int | None = None
    every: int | None = None

    def surplus(self, iterations: Iterable[int], newest: int) -> list[int]:
        """The published iterations to delete, now that ``newest`` is published."""
        if self.last is None:
            return []
        older = sorted(iteration for iteration in iterations if iteration < newest)
        milestones = self._milestones(older)
        return [
            iteration for iteration in older[: max(0, len(older) - (self.last - 1))] if iteration not in milestones
        ]  # fmt: skip

    def _milestones(self, iterations: Iterable[int]) -> set[int]:
        found: dict[int, int] = {}
        for iteration in iterations if self.every else ():
            assert self.every is not None
            found.setdefault(iteration // self.every, iteration)
        return {iteration for multiple, iteration in found.items() if multiple}


KEEP_ALL = Retention()


def delete_checkpoint(folder: Path) -> None:
    """Delete a published folder, or warn that it cannot be deleted.

    Takes the folder's name away first, so that a run killed meanwhile leaves no folder that looks whole.
    """
    hidden = folder.with_name(f".{folder.name}.deleted")
    try:
        os.rename(folder, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("cannot delete the surplus checkpoint %s: %s", folder, error)
    else:
        logger.info("deleted the surplus checkpoint %s", folder)
