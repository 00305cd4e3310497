"""Which checkpoints of a run are kept."""

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
        last: the newest so many; None keeps all.
        every: and those of iterations that are multiples of this.
    """

    last: int | None = None
    every: int | None = None

    def surplus(self, iterations: Iterable[int], newest: int) -> list[int]:
        """Which of the published iterations to delete, now that ``newest`` is published.

        Later ones, of a run that was taken back to an earlier iteration, are neither counted nor deleted: they
        may be damaged, and must not stand for good ones.
        """
        if self.last is None:
            return []
        older = sorted(iteration for iteration in iterations if iteration < newest)
        return [
            iteration for iteration in older[: max(0, len(older) - (self.last - 1))]
            if not (self.every and iteration % self.every == 0)
        ]  # fmt: skip


KEEP_ALL = Retention()


def delete_checkpoint(folder: Path) -> None:
    """Delete a published folder; one that cannot be deleted is reported and stays.

    It loses its name first, so that a run killed meanwhile leaves no folder that looks whole.
    """
    hidden = folder.with_name(f".{folder.name}.partial")
    try:
        os.rename(folder, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s, which is not to be kept, cannot be deleted: %s", folder, error)
    else:
        logger.info("deleted %s, which is not to be kept", folder)
