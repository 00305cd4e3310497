"""Folders under ``--save``: what they are called, and how they are found again on resume.

``iter_0000010/`` holds the sharded tensors with their index, ``model_config.json``, ``state.json`` and a
manifest of all these, by which they are verified before they are loaded. How it is written: ``checkpoint.saving``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.manifest import MANIFEST_NAME, verify
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.conditioning.build import read_model_config
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.files import read_json

TRACKER_NAME = "latest_checkpointed_iteration.txt"
MODEL_CONFIG_NAME = "model_config.json"
STATE_NAME = "state.json"

logger = logging.getLogger(__name__)

_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")


def iteration_folder(iteration: int) -> str:
    """Name of the folder of one iteration, as Megatron spells it."""
    return f"iter_{iteration:07d}"


def set_aside(final: Path) -> Path:
    """Where a checkpoint of the same iteration waits while a new one takes its name."""
    return final.with_name(f".{final.name}.replaced")


def find_checkpoint(
    root: Path,
    iteration: int | None = None,
    *,
    peers: Peers | None = None,
    needs: Callable[[str], bool] = lambda key: True,
) -> Path | None:
    """The verified folder to load: the newest good one under a ``--save`` folder, or ``root`` if it is one.

    Under a ``--save`` folder a damaged checkpoint is passed over, with a warning, for the one before it. What was
    asked for by name or number is verified too, but nothing takes its place.

    Args:
        root: a ``--save`` folder, or one of its ``iter_*`` folders.
        iteration: this iteration instead of the latest.
        peers: ranks that load together: each reads its part of the files to verify them, and all get the same folder.
            By default this process verifies alone.
        needs: whether a tensor, by its key, will be read; files without such tensors are not verified.

    Returns:
        The folder, or None if ``root`` is absent or holds no checkpoint yet.

    Raises:
        CheckpointError: the same on all peers: no checkpoint is whole, the one asked for is damaged or missing, or
            ``root`` is something else, such as an exported model.
    """
    peers = peers or Peers(0, 1)
    candidates: list[Path] = []
    error: Exception | None = None
    if peers.rank == 0:
        try:
            candidates = _candidates(root, iteration)
        except (CheckpointError, OSError) as caught:
            error = caught
    peers.agree(error, f"looking for a checkpoint in {root}")
    candidates = peers.share(candidates)
    faults: list[str] = []
    for folder in candidates:
        fault = _fault(folder, peers, needs)
        if fault is None:
            return folder
        faults.append(fault)
        if folder != root and iteration is None and peers.rank == 0:
            logger.warning("%s is passed over for the checkpoint before it: %s", folder, fault)
    if not faults:
        return None
    if candidates == [root]:
        raise CheckpointError(
            f"{faults[0]}; load another checkpoint, or the folder above, of which the newest good one is taken"
        )
    raise CheckpointError(f"{root} holds no checkpoint that is whole: {'; '.join(faults)}")


def _fault(folder: Path, peers: Peers, needs: Callable[[str], bool]) -> str | None:
    """What is wrong with a checkpoint, agreed by all peers."""
    error: Exception | None = None
    try:
        verify(folder, part=peers.rank, parts=peers.world_size, needs=needs)
    except CheckpointError as caught:
        error = caught
    failure = peers.first_failure(error)
    return None if failure is None else failure.message


def has_checkpoint(root: Path) -> bool:
    """Whether a ``--save`` folder holds published checkpoints, whole or damaged."""
    return root.is_dir() and bool(published_iterations(root))


def _candidates(root: Path, iteration: int | None) -> list[Path]:
    """Folders to try, in this order."""
    if not root.exists():
        return []
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; give a folder written by --save")
    if iteration is None and ((root / MANIFEST_NAME).is_file() or _ITERATION_FOLDER.fullmatch(root.name)):
        return [root]
    if (root / "model_index.json").exists() or (root / "config.json").exists():
        raise CheckpointError(
            f"{root} is not a training checkpoint but an exported model; "
            "convert it first: flashi2v convert --from diffusers PATH --to megatron PATH"
        )
    published = published_iterations(root)
    wanted = _wanted_iterations(root, published) if iteration is None else [iteration]
    folders = [root / iteration_folder(number) for number in wanted]
    # A run that was killed while it replaced a checkpoint left the old one aside.
    candidates = [path for folder in folders for path in (folder, set_aside(folder)) if path.is_dir()]
    if wanted and not candidates:
        listed = ", ".join(map(str, published)) or "none"
        raise CheckpointError(
            f"{folders[0]} is missing, though iteration {wanted[0]} is wanted ({root / TRACKER_NAME}, or asked for); "
            f"checkpoints in {root}: {listed}"
        )
    return candidates


def _wanted_iterations(root: Path, published: list[int]) -> list[int]:
    """The iteration that the tracker names and those before it, or all where it names none; newest first."""
    tracker = root / TRACKER_NAME
    # A folder is renamed to its name only when it is whole: without a tracker, the run was killed before it wrote one.
    newest = max(published, default=None)
    if tracker.exists():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text.isdecimal():
            newest = int(text)
        elif newest is None:
            raise CheckpointError(f"{tracker} holds {text!r}; it must hold an iteration's number")
        else:
            logger.warning("%s holds %r, which is no iteration's number; the newest folder is taken", tracker, text)
    if newest is None:
        return []
    older = [number for number in published if number < newest]
    if tracker.exists() and older and not _is_there(root, newest):
        logger.warning("%s names iteration %d, which is missing; one before it is taken", tracker, newest)
    return [newest, *reversed(older)]


def _is_there(root: Path, iteration: int) -> bool:
    folder = root / iteration_folder(iteration)
    return folder.is_dir() or set_aside(folder).is_dir()


def published_iterations(root: Path) -> list[int]:
    """Iterations of the checkpoints in a ``--save`` folder, in order, whole or damaged."""
    matches = (_ITERATION_FOLDER.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def load_state(folder: Path) -> dict[str, Any]:
    """The ``state`` that was saved with a checkpoint.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    return _load_object(folder / STATE_NAME)


def load_model_config(folder: Path) -> ModelConfig:
    """The model that a checkpoint is of.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    path = folder / MODEL_CONFIG_NAME
    try:
        return read_model_config(_load_object(path), source=str(path))
    except (UserError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}" if isinstance(error, TypeError) else str(error)) from error


def _load_object(path: Path) -> dict[str, Any]:
    value = read_json(path, error=CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def require_same_model(stored: ModelConfig, wanted: ModelConfig, source: Path | str) -> None:
    """Refuse to load a checkpoint into another model.

    Raises:
        CheckpointError: lists every field that differs, as stored and as asked for.
    """
    have, want = stored.to_json(), wanted.to_json()
    differing = [
        f"{field} is {have[field]} in the checkpoint, {want[field]} was asked for"
        for field in have
        if have[field] != want[field]
    ]
    if differing:
        raise CheckpointError(f"{source} is of another model: {'; '.join(differing)}")
