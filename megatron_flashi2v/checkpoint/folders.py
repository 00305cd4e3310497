"""Folders under ``--save``: their names, and the search for the one to resume from.

``iter_0000010/`` holds the sharded tensors with their index, ``model_config.json``, ``state.json`` and a manifest of
all these, against which they are verified before loading. ``checkpoint.saving`` writes it.
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
from megatron_flashi2v.runtime.files import read_json_object

TRACKER_NAME = "latest_checkpointed_iteration.txt"
MODEL_CONFIG_NAME = "model_config.json"
STATE_NAME = "state.json"

logger = logging.getLogger(__name__)

_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")
# The conversion recognises the format by itself, which this module cannot: it lies below.
_CONVERT = (
    "give a folder written by --save, or convert the model first: flashi2v convert --from auto PATH --to megatron PATH"
)
_WEIGHTS = ("*.safetensors", "*.pth")


def iteration_folder(iteration: int) -> str:
    """Name of an iteration's folder, in Megatron's spelling."""
    return f"iter_{iteration:07d}"


def set_aside(final: Path) -> Path:
    """Path at which a checkpoint waits while a new one of the same iteration takes its name."""
    return final.with_name(f".{final.name}.replaced")


def find_checkpoint(
    root: Path,
    iteration: int | None = None,
    *,
    peers: Peers | None = None,
    needs: Callable[[str], bool] = lambda key: True,
) -> Path | None:
    """Find and verify the folder to load: the newest whole one under a ``--save`` folder, or ``root`` itself.

    Under a ``--save`` folder, skips damaged checkpoints with a warning. A folder or an iteration that the caller names
    is verified too, but not replaced by another.

    Args:
        root: a ``--save`` folder, or one of its ``iter_*`` folders.
        iteration: load this iteration instead of the latest.
        peers: ranks that load together: each verifies its part of the files, and all get the same folder. By default
            this process verifies alone.
        needs: whether the caller will read a tensor, by its key; files without such tensors are not verified.

    Returns:
        The folder, or None if ``root`` is absent or holds no checkpoint yet.

    Raises:
        CheckpointError: the same on all peers: no checkpoint is whole, the named one is damaged or missing, or
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
    candidates = [Path(path) for path in peers.share([str(path) for path in candidates])]
    faults: list[str] = []
    for folder in candidates:
        fault = _fault(folder, peers, needs)
        if fault is None:
            return folder
        faults.append(fault)
        if folder != root and iteration is None and peers.rank == 0:
            logger.warning("skipping %s for the checkpoint before it: %s", folder, fault)
    if not faults:
        return None
    if candidates == [root]:
        raise CheckpointError(
            f"{faults[0]}; load another checkpoint, or the folder above, to get its newest whole one"
        )
    raise CheckpointError(f"{root} holds no whole checkpoint: {'; '.join(faults)}")


def _fault(folder: Path, peers: Peers, needs: Callable[[str], bool]) -> str | None:
    """Why a checkpoint is not whole, the same on all peers; None if it is."""
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
    """Folders to try, in order."""
    if not root.exists():
        return []
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; {_CONVERT}")
    if iteration is None and ((root / MANIFEST_NAME).is_file() or _ITERATION_FOLDER.fullmatch(root.name)):
        return [root]
    if any((root / name).exists() for name in ("model_index.json", "config.json")):
        raise CheckpointError(f"{root} is an exported model, not a training checkpoint; {_CONVERT}")
    published = published_iterations(root)
    if not published and (any(any(root.glob(pattern)) for pattern in _WEIGHTS) or (root / "transformer").is_dir()):
        raise CheckpointError(f"{root} holds a model's weights, not a training checkpoint; {_CONVERT}")
    wanted = _wanted_iterations(root, published) if iteration is None else [iteration]
    folders = [root / iteration_folder(number) for number in wanted]
    # A run killed while it replaced a checkpoint left the old one aside.
    candidates = [path for folder in folders for path in (folder, set_aside(folder)) if path.is_dir()]
    if wanted and not candidates:
        listed = ", ".join(map(str, published)) or "none"
        raise CheckpointError(
            f"{folders[0]} is missing, though the caller or {root / TRACKER_NAME} names iteration {wanted[0]}; "
            f"checkpoints in {root}: {listed}"
        )
    return candidates


def _wanted_iterations(root: Path, published: list[int]) -> list[int]:
    """The tracker's iteration and those before it, newest first; all iterations if it names none."""
    tracker = root / TRACKER_NAME
    # A folder gets its name only when it is whole: a run without a tracker was killed before it wrote one.
    newest = max(published, default=None)
    if tracker.exists():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text.isdecimal():
            newest = int(text)
        elif newest is None:
            raise CheckpointError(f"{tracker} holds {text!r}; it must hold an iteration's number")
        else:
            logger.warning("%s holds %r, which is not an iteration's number; taking the newest folder", tracker, text)
    if newest is None:
        return []
    older = [number for number in published if number < newest]
    if tracker.exists() and older and not _is_there(root, newest):
        logger.warning("%s names iteration %d, which is missing; taking one before it", tracker, newest)
    return [newest, *reversed(older)]


def _is_there(root: Path, iteration: int) -> bool:
    folder = root / iteration_folder(iteration)
    return folder.is_dir() or set_aside(folder).is_dir()


def published_iterations(root: Path) -> list[int]:
    """Iterations of a ``--save`` folder's checkpoints, whole or damaged, in ascending order."""
    matches = (_ITERATION_FOLDER.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def load_state(folder: Path) -> dict[str, Any]:
    """Read the ``state`` that was saved with a checkpoint.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    return read_json_object(folder / STATE_NAME, error=CheckpointError)


def load_model_config(folder: Path) -> ModelConfig:
    """Read the configuration of a checkpoint's model.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    path = folder / MODEL_CONFIG_NAME
    try:
        return read_model_config(read_json_object(path, error=CheckpointError), source=str(path))
    except (UserError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}" if isinstance(error, TypeError) else str(error)) from error


def require_same_model(stored: ModelConfig, wanted: ModelConfig, source: Path | str) -> None:
    """Refuse to load a checkpoint into another model.

    Raises:
        CheckpointError: lists every field that differs, with both values.
    """
    have, want = stored.to_json(), wanted.to_json()
    differing = [
        f"{field} is {have[field]} in the checkpoint, {want[field]} was asked for"
        for field in have
        if have[field] != want[field]
    ]
    if differing:
        raise CheckpointError(f"{source} is of another model: {'; '.join(differing)}")
