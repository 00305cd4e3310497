"""Folders under ``--save``: published whole or not at all, found again on resume.

``iter_0000010/`` holds the sharded tensors with their index, ``model_config.json`` and ``state.json``. It is
written as ``.iter_0000010.partial`` and renamed when everything is on the disk; only then does
``latest_checkpointed_iteration.txt`` name it, so that a run killed at any moment leaves a checkpoint that is
whole.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_flashi2v.checkpoint.index import INDEX_NAME, read_index
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.state import MODEL_PREFIX
from megatron_flashi2v.checkpoint.storage import TensorPiece, write_pieces
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.files import atomic_write_json, atomic_write_text, read_json

TRACKER_NAME = "latest_checkpointed_iteration.txt"
MODEL_CONFIG_NAME = "model_config.json"
STATE_NAME = "state.json"

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
        rank: this rank's place in ``group``.
        world_size: ranks in ``group``.
        group: process group that can exchange objects; None is the default group.

    Returns:
        The published folder.

    Raises:
        CheckpointError: the same on all ranks, if any of them failed. Nothing is left under the final name,
            and the checkpoint before is as it was.
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
    """Write what belongs to a checkpoint besides its tensors."""
    atomic_write_json(folder / MODEL_CONFIG_NAME, model_config.to_json())
    atomic_write_json(folder / STATE_NAME, dict(state))


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


def find_checkpoint(root: Path, iteration: int | None = None) -> Path | None:
    """The folder to load: the latest under a ``--save`` folder, or ``root`` itself if it is a checkpoint.

    Args:
        root: a ``--save`` folder, or one of its ``iter_*`` folders.
        iteration: this iteration instead of the latest.

    Returns:
        The folder, or None if ``root`` is absent or holds no checkpoint yet.

    Raises:
        CheckpointError: the tracker is malformed or names a missing folder, the iteration asked for is
            missing, or ``root`` is something else, such as an exported model.
    """
    if not root.exists():
        return None
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; give a folder written by --save")
    if (root / INDEX_NAME).is_file() and iteration is None:
        return root
    if (root / "model_index.json").exists() or (root / "config.json").exists():
        raise CheckpointError(
            f"{root} is not a training checkpoint but an exported model; "
            "convert it first: flashi2v convert --from diffusers PATH --to megatron PATH"
        )
    if iteration is None:
        iteration = _latest_iteration(root)
    if iteration is None:
        if _ITERATION_FOLDER.fullmatch(root.name):
            raise CheckpointError(f"{root / INDEX_NAME} does not exist; the checkpoint is not whole")
        return None
    folder = root / iteration_folder(iteration)
    for candidate in (folder, _set_aside(folder)):
        if (candidate / INDEX_NAME).is_file():
            return candidate
    published = ", ".join(str(number) for number in _published_iterations(root)) or "none"
    raise CheckpointError(
        f"{folder} is missing or not whole, though iteration {iteration} is wanted "
        f"({root / TRACKER_NAME}, or asked for); whole checkpoints in {root}: {published}"
    )


def _latest_iteration(root: Path) -> int | None:
    tracker = root / TRACKER_NAME
    if not tracker.exists():
        # A folder is renamed to its name only when it is whole, so this is a run killed before it wrote the
        # tracker.
        return max(_published_iterations(root), default=None)
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise CheckpointError(f"{tracker} holds {text!r}; it must hold an iteration's number")
    return int(text)


def _published_iterations(root: Path) -> list[int]:
    matches = (
        _ITERATION_FOLDER.fullmatch(path.name) for path in root.iterdir() if (path / INDEX_NAME).is_file()
    )
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
