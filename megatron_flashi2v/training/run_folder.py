"""Where a run starts: anew, or from a checkpoint; and what becomes of an earlier run's files in its ``--save`` folder.

The same command started twice goes on: without ``--load``, a run resumes the checkpoints in its ``--save`` folder.
Nothing of another run is cut or replaced: such a folder is refused, or set aside whole by ``--fresh``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_flashi2v.checkpoint.folders import TRACKER_NAME, find_checkpoint, has_checkpoint
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.config.errors import CheckpointError, WriteError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.runtime.files import atomic_write_text, name_beside, read_jsonl
from megatron_flashi2v.training.metrics import METRICS_FILE
from megatron_flashi2v.training.run_state import CONFIG_FILE, Provenance, load_training_state, require_model_of

CONFIG_FILE_BESIDE = "config.resolved.yaml"
"""Where the flags go if ``config.yaml`` is the user's own."""
CONFIG_HEAD = "# Written by flashi2v train at the latest start of this run: all of its flags, as a recipe.\n"
LAYOUT_FIELDS = frozenset({"load", "fresh", "log_interval", "dry_run", "world_size", "device"})
"""Flags by which two starts of one run may differ before it has a checkpoint."""

_FLAGS_OF_NO_RECIPE = frozenset({"dry_run", "world_size", "load", "log_interval"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: the checkpoint to go on from, verified; None starts anew.
        continues: whether it is of the ``--save`` folder, so that model and data must be this run's.
        started_from: folder that ``--load`` named when the run began; None for one that began anew.
    """

    checkpoint: Path | None
    continues: bool
    started_from: str | None

    def require_same_run(self, model: ModelConfig, now: Provenance) -> None:
        """Refuse to go on in a ``--save`` folder with another model or other data than its checkpoint's.

        Args:
            model: dimensions, as the data fit them.
            now: of the run that starts.

        Raises:
            CheckpointError: lists what differs, with both values.
        """
        if self.checkpoint is None or not self.continues:
            return
        save = self.checkpoint.parent
        other = f"choose another --save, or set {save} aside with --fresh"
        try:
            require_model_of(self.checkpoint, model)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {other}") from error
        state = load_training_state(self.checkpoint)
        if not state["iteration"]:  # converted weights have seen no data
            return
        before = state["data"]
        differing = [
            f"{name} is {before.get(name)} there and {value} here"
            for name, value in now.data.items() if before.get(name, value) != value
        ]
        if differing:
            raise CheckpointError(
                f"--save {save} holds a run on other data than {now.data_name}: {'; '.join(differing)}; {other}, or "
                f"start from its weights and optimizer with --load {save} and another --save"
            )


def choose_start(config: TrainConfig, peers: Peers) -> Start:
    """Find the checkpoint that a run goes on from; set the ``--save`` folder aside where ``--fresh`` asks. Collective.

    Args:
        config: flags and recipe, checked.
        peers: all ranks.

    Raises:
        CheckpointError: the same on all ranks: ``--load`` holds no checkpoint, a checkpoint is damaged, or ``--save``
            holds files of another run.
    """
    source: str | None = None
    error: Exception | None = None
    if peers.rank == 0:
        try:
            arguments = config.checkpoint
            _require_loadable(arguments.load, arguments.save)
            if arguments.fresh and arguments.save is not None:
                _set_aside(arguments.save)
            source = _source(config)
        except (CheckpointError, WriteError, OSError) as caught:
            error = caught
    failure = peers.first_failure(error)
    if failure is not None:
        raise CheckpointError(failure.message) from error
    source = peers.share(source)
    if source is None:
        return Start(checkpoint=None, continues=False, started_from=None)
    found = find_checkpoint(Path(source), peers=peers)
    if found is None:  # it was there a moment ago
        raise CheckpointError(f"{source} holds no checkpoint; {_WHERE_TO_LOAD_FROM}")
    save = config.checkpoint.save
    if save is not None and _is_same(found.parent, save):
        earlier = load_training_state(found).get("started_from")
        return Start(checkpoint=found, continues=True, started_from=earlier)
    return Start(checkpoint=found, continues=False, started_from=str(Path(source).resolve()))


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the resolved flags as a recipe that ``--config`` reads back; a file of the user's own is not touched."""
    path = folder / CONFIG_FILE
    if path.exists() and not _is_ours(path):
        path = folder / CONFIG_FILE_BESIDE
    atomic_write_text(path, CONFIG_HEAD + _as_recipe(config))


_WHERE_TO_LOAD_FROM = (
    "give a folder that an earlier run saved to, or one iter_* in it; to go on in the --save folder, leave --load out"
)


def _require_loadable(load: Path | None, save: Path | None) -> None:
    """Refuse a ``--load`` without a checkpoint before anything is set aside; the ``--save`` folder may hold none."""
    if load is None or (save is not None and _is_same(load, save)):
        return
    if not load.exists():
        raise CheckpointError(f"--load {load} does not exist; {_WHERE_TO_LOAD_FROM}")
    if find_checkpoint(load, needs=lambda key: False) is None:
        raise CheckpointError(f"--load {load} holds no checkpoint; {_WHERE_TO_LOAD_FROM}")


def _source(config: TrainConfig) -> str | None:
    """The folder to look for a checkpoint in, or None."""
    save, load = config.checkpoint.save, config.checkpoint.load
    own = save is not None and (has_checkpoint(save) or any(save.glob(".iter_*.replaced")))
    if load is not None and not (save is not None and _is_same(load, save)):
        if save is None or _is_inside(load, save):
            return str(load)
        if not own:
            _require_no_lost_run(config, save)
            return str(load)
        if _started_from(save) == str(load.resolve()):  # the same command, started again
            return str(save)
        raise CheckpointError(
            f"--save {save} holds checkpoints of a run that did not start from --load {load}; leave --load out to go "
            "on with that run, choose another --save, or set it aside with --fresh"
        )
    if own:
        return str(save)
    if save is not None:
        _require_no_lost_run(config, save)
    return None


def _require_no_lost_run(config: TrainConfig, save: Path) -> None:
    """Refuse a folder with the metrics of a run whose checkpoints are gone, or that is another one.

    A run that was killed before its first checkpoint starts again.
    """
    metrics = save / METRICS_FILE
    if not metrics.exists():
        return
    rows = read_jsonl(metrics)
    if not rows:
        return
    reached, begun = rows[-1]["iteration"], rows[0]["iteration"] - 1
    interval = config.checkpoint.save_interval or config.batch.train_iters
    first_save = min((begun // interval + 1) * interval, config.batch.train_iters)
    if reached < first_save and not (save / TRACKER_NAME).exists() and _is_start_of(config, save):
        logger.info("%s holds no checkpoint: its run was stopped at iteration %d, before its first; it starts again",
                    save, reached)
        return
    raise CheckpointError(
        f"--save {save} holds no checkpoint but {METRICS_FILE} of a run of {reached} iterations, which would be cut; "
        "choose another --save, or set it aside with --fresh"
    )


def _is_start_of(config: TrainConfig, save: Path) -> bool:
    """Whether ``config.yaml`` in the folder says that it is this very run's."""
    path = save / CONFIG_FILE_BESIDE
    path = path if path.exists() else save / CONFIG_FILE
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(stored, dict) and _comparable(stored) == _comparable(yaml.safe_load(_as_recipe(config)))


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in LAYOUT_FIELDS}


def _started_from(save: Path) -> str | None:
    """The folder that the run in a ``--save`` folder was started from by ``--load``; None where none is recorded."""
    newest = find_checkpoint(save, needs=lambda key: False)
    return None if newest is None else load_training_state(newest).get("started_from")


def _set_aside(save: Path) -> None:
    """Rename a folder that holds anything, in one step, so that nothing is lost whenever this is interrupted.

    Raises:
        WriteError: it cannot be renamed, such as a mount point.
    """
    if not save.is_dir() or not any(save.iterdir()):
        return
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = save.with_name(name_beside(save.name, after=f".before-{stamp}"))
    number = 1
    while target.exists():
        number += 1
        target = save.with_name(name_beside(save.name, after=f".before-{stamp}-{number}"))
    try:
        os.rename(save, target)
    except OSError as error:
        raise WriteError(
            f"--fresh cannot set {save} aside as {target} ({error.strerror}); rename it, or choose another --save"
        ) from error
    logger.info("--fresh: %s is now %s", save, target)


def _is_same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _is_ours(path: Path) -> bool:
    """Whether a ``config.yaml`` was written by :func:`write_config`, also by version 0.1, which did not mark it.

    That version wrote every flag, those among them that no recipe holds.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(CONFIG_HEAD):
            return True
        values = yaml.safe_load(text)
        return (
            isinstance(values, dict)
            and values.keys() >= _FLAGS_OF_NO_RECIPE
            and text == yaml.safe_dump(values, sort_keys=False)
        )
    except (UnicodeDecodeError, yaml.YAMLError):
        return False


def _as_recipe(config: TrainConfig) -> str:
    return yaml.safe_dump(flat_values(config), sort_keys=False)
