"""Folders under ``--save``: published whole or not at all, found again on resume.

``iter_0000010/`` holds the sharded tensors with their index, ``model_config.json``, ``state.json`` and a
manifest of all these, by which they are verified before they are loaded. It is written as
``.iter_0000010.partial`` and renamed when everything is on the disk; only then does
``latest_checkpointed_iteration.txt`` name it, so that a run killed at any moment leaves a checkpoint that is
whole.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_flashi2v.checkpoint.index import read_index
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.manifest import MANIFEST_NAME, verify, write_manifest
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.retention import KEEP_ALL, Retention, delete_checkpoint
from megatron_flashi2v.checkpoint.state import MODEL_PREFIX
from megatron_flashi2v.checkpoint.storage import TensorPiece, write_pieces
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.files import atomic_write_json, atomic_write_text, read_json

TRACKER_NAME = "latest_checkpointed_iteration.txt"
MODEL_CONFIG_NAME = "model_config.json"
STATE_NAME = "state.json"

logger = logging.getLogger(__name__)

_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")


def iteration_folder(iteration: int) -> str:
    """Name of the folder of one iteration, as Megatron spells it."""
    return f"iter_{iteration:07d}"


def save_checkpoint(
    root: Path,
    iteration: int,
    *,
    pieces: Iterable[TensorPiece],
    model_config: ModelConfig,
    state: Mapping[str, Any],
    retention: Retention = KEEP_ALL,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write one checkpoint and make it the latest; every rank of ``group`` calls it with the pieces it holds.

    Args:
        root: the run's ``--save`` folder, on a file system that all ranks share.
        iteration: iterations done.
        pieces: what this rank holds (see ``checkpoint.state`` and ``checkpoint.optimizer_state``).
        model_config: written as ``model_config.json``.
        state: JSON-ready values that are the same on all ranks, such as the iteration, the samples consumed,
            the schedule's and the optimizer's scalars; rank 0's are written.
        retention: which older checkpoints of ``root`` stay, once this one is published.
        rank: this rank's place in ``group``.
        world_size: ranks in ``group``.
        group: process group that can exchange objects; None is the default group.

    Returns:
        The published folder.

    Raises:
        StorageError: the same on all ranks: a disk is full or refuses.
        CheckpointError: the same on all ranks, if any of them failed otherwise. In either case nothing is left
            under the final name, and the checkpoint before is as it was.
    """
    peers = Peers(rank, world_size, group)
    final = root / iteration_folder(iteration)
    partial = root / f".{final.name}.partial"
    doing = f"saving {final}"
    try:
        _on_root(peers, doing, lambda: _prepare(root, partial))
        write_pieces(partial, pieces, rank=rank, world_size=world_size, group=group)
        _on_root(peers, doing, lambda: _finish(root, iteration, partial, final, model_config, state))
    except CheckpointError:
        # Every rank is past its last write here, since they raise together.
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0:
        for surplus in retention.surplus(_published_iterations(root), iteration):
            delete_checkpoint(root / iteration_folder(surplus))
    return final


def _on_root(peers: Peers, doing: str, action: Callable[[], None]) -> None:
    """Run ``action`` on rank 0 while the others wait, and raise everywhere if it fails."""
    error: Exception | None = None
    if peers.rank == 0:
        try:
            action()
        except Exception as caught:
            error = caught
    peers.agree(error, doing)


def _prepare(root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".iter_*.partial"):  # left by a run that was killed while it saved
        shutil.rmtree(stale)
    partial.mkdir()


def _finish(
    root: Path,
    iteration: int,
    partial: Path,
    final: Path,
    model_config: ModelConfig,
    state: Mapping[str, Any],
) -> None:
    _require_whole_model(partial, model_config)
    finish_folder(partial, model_config, state)
    _flush_folder(partial)
    replaced = _set_aside(final)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(partial, final)
        _flush_folder(root)
        write_tracker(root, iteration)
    except (OSError, UserError):
        if final.exists():
            os.rename(final, partial)
        if replaced.exists():
            os.rename(replaced, final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def finish_folder(folder: Path, model_config: ModelConfig, state: Mapping[str, Any]) -> None:
    """Write what belongs to a checkpoint besides its tensors and their index; the manifest last."""
    atomic_write_json(folder / MODEL_CONFIG_NAME, model_config.to_json())
    atomic_write_json(folder / STATE_NAME, dict(state))
    write_manifest(folder, (MODEL_CONFIG_NAME, STATE_NAME))


def write_tracker(root: Path, iteration: int) -> None:
    """Name the latest iteration."""
    atomic_write_text(root / TRACKER_NAME, f"{iteration}\n")


def _require_whole_model(folder: Path, model_config: ModelConfig) -> None:
    """Compare what was written with the model's names and shapes.

    A slice that lacks its tensor-parallel tag would pass for the whole tensor, and a forgotten layer for
    none: a checkpoint that no layout could load must not replace a good one.
    """
    stored = {
        key.removeprefix(MODEL_PREFIX): tensor.shape
        for key, tensor in read_index(folder).tensors.items()
        if key.startswith(MODEL_PREFIX)
    }
    expected = parameter_shapes(model_config)
    for name in sorted(expected.keys() | stored.keys()):
        wanted, written = expected.get(name, "none"), stored.get(name, "none")
        if wanted != written:
            raise CheckpointError(
                f"tensor {name} has shape {wanted} in this model, but {written} was written; "
                "the layout of a parameter is described wrongly"
            )


def _set_aside(final: Path) -> Path:
    """Where a checkpoint of the same iteration waits while a new one takes its name."""
    return final.with_name(f".{final.name}.replaced")


def _flush_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: a rename is only durable once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    return root.is_dir() and bool(_published_iterations(root))


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
    published = _published_iterations(root)
    wanted = _wanted_iterations(root, published) if iteration is None else [iteration]
    folders = [root / iteration_folder(number) for number in wanted]
    # A run that was killed while it replaced a checkpoint left the old one aside.
    candidates = [path for folder in folders for path in (folder, _set_aside(folder)) if path.is_dir()]
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
    return folder.is_dir() or _set_aside(folder).is_dir()


def _published_iterations(root: Path) -> list[int]:
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
        return ModelConfig.from_json(_load_object(path), source=str(path))
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
