"""Folders that appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.runtime.files import full_disk_named, name_beside, sync_folder, write_errors

logger = logging.getLogger(__name__)


def publish_folder(
    partial: Path, final: Path, *, aside: Path, commit: Callable[[], None] = lambda: None
) -> None:
    """Rename a whole folder to its final name; if that or ``commit`` fails, everything is as it was.

    A kill at any moment leaves the new folder or the old one whole, the old one maybe as ``aside``.

    Args:
        partial: the folder, its files and entries flushed to the disk.
        final: beside it; an older folder there is replaced.
        aside: where the older folder waits, beside both. A killed run may have left one there: it is removed, or
            takes the final name again if this fails.
        commit: called once the new name is on the disk; what refers to the folder is written here.

    Raises:
        OSError: a rename failed. Errors of ``commit`` pass.
    """
    if final.exists() and any(final.iterdir()):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    renamed = False
    try:
        os.rename(partial, final)
        renamed = True
        sync_folder(final.parent)
        commit()
    except BaseException:
        if renamed:
            os.rename(final, partial)
        if aside.exists():
            os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        logger.warning("%s, which %s has replaced, cannot be removed", aside, final)


@contextlib.contextmanager
def staged_folder(final: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that is published when the body ends, and removed when the body fails.

    Yields ``.NAME.partial`` beside ``final``. What a killed run left there is removed on the next try, so at most one
    process may write one ``final`` at a time (in a distributed job, rank 0 holds the context while the others write
    between two barriers).

    Args:
        final: where the folder is to stand; an empty folder there counts as none. Its parents are made.
        overwrite: replace an existing folder, which stays whole until the new one is.

    Raises:
        UserError: ``final`` exists and may not be replaced, the disk is full, or the path cannot be written.
    """
    final = Path(final)
    partial = final.with_name(name_beside(final.name, ".", ".partial"))
    previous = final.with_name(name_beside(final.name, ".", ".previous"))
    with write_errors(final):
        if previous.exists() and not final.exists():
            previous.rename(final)  # a run was killed between the two renames of publish_folder
        _refuse_existing(final, overwrite)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    try:
        with full_disk_named(final):
            yield partial
        with write_errors(final):
            _sync_tree(partial)
            _refuse_existing(final, overwrite)
            publish_folder(partial, final, aside=previous)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_replaceable(final: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Refuse to replace a folder unasked, or one that is not an earlier result; asked before work begins.

    Args:
        final: what is to be written; if it is an empty folder or none, it is free.
        overwrite: whether the user allows replacing it.
        is_ours: whether a folder holds an earlier result and nothing else.

    Raises:
        UserError: it may not be replaced.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    ours = final.is_dir() and is_ours(final)
    if not (overwrite and ours):
        raise UserError(f"{final} exists; choose another path" + (", or give --overwrite" if ours else ""))


def _refuse_existing(final: Path, overwrite: bool) -> None:
    if final.exists() and not final.is_dir():
        raise UserError(f"{final}: a file is in the way of the folder; move it or choose another path")
    if not overwrite and final.is_dir() and any(final.iterdir()):
        raise UserError(f"{final}: the folder exists and is not empty; remove it or choose another path")


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            with open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
