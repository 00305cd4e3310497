"""Writing a checkpoint: published whole or not at all.

Ranks write into ``.iter_0000010.partial``. Once everything is on the disk it is renamed to ``iter_0000010``, and only
then does ``latest_checkpointed_iteration.txt`` name it: a run killed at any moment leaves a whole checkpoint.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.adapter_record import ADAPTER_NAME, AdapterRecord
from megatron_flashi2v.checkpoint.folders import (
    MODEL_CONFIG_NAME,
    STATE_NAME,
    TRACKER_NAME,
    iteration_folder,
    published_iterations,
    set_aside,
)
from megatron_flashi2v.checkpoint.index import Index, index_text, parse_index, read_index, write_index
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.manifest import write_manifest
from megatron_flashi2v.checkpoint.model_state import MODEL_PREFIX
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.retention import KEEP_ALL, Retention, delete_checkpoint
from megatron_flashi2v.checkpoint.storage import TensorPiece, merge_parts, write_rank_file
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.files import atomic_write_json, atomic_write_text, sync_folder
from megatron_flashi2v.runtime.publishing import publish_folder

logger = logging.getLogger(__name__)


class CheckpointSave:
    """One checkpoint in the making; every rank of ``peers`` creates one at the same point.

    A save has three steps: each rank takes the values and rank 0 makes the folder; each rank writes its file; rank 0
    publishes. :meth:`work` does one step without communication, so that it may run in a thread beside training. Once
    all ranks have worked, :meth:`settle` makes them agree, and the next step begins.

    Args:
        root: the run's ``--save`` folder, on a file system that all ranks share.
        iteration: iterations done.
        pieces: this rank's parts of tensors (see ``checkpoint.model_state`` and ``checkpoint.optimizer_state``).
        model_config: written as ``model_config.json``.
        adapter: what of the model the pieces are, where they are not all of it.
        state: JSON-ready values that are the same on all ranks, such as the iteration, the samples consumed,
            the schedule's and the optimizer's scalars; rank 0 writes its own.
        retention: which older checkpoints of ``root`` to keep once this one is published.
        peers: the ranks that write it.
        take: called with ``pieces`` in the first step. If it copies, the checkpoint holds the values of that moment;
            by default it holds the values of the moment of writing.
    """

    def __init__(
        self,
        root: Path,
        iteration: int,
        *,
        pieces: Iterable[TensorPiece],
        model_config: ModelConfig,
        adapter: AdapterRecord | None = None,
        state: Mapping[str, Any],
        retention: Retention = KEEP_ALL,
        peers: Peers,
        take: Callable[[Iterable[TensorPiece]], list[TensorPiece]] = list,
    ) -> None:
        self.folder = root / iteration_folder(iteration)
        self._root, self._iteration = root, iteration
        self._partial = root / f".{self.folder.name}.partial"
        self._pieces, self._take = pieces, take
        self._model_config, self._state = model_config, copy.deepcopy(dict(state))
        self._adapter = adapter
        self._retention, self._peers = retention, peers
        self._part: Index | None = None
        self._parts: list[bytes] = []
        self._error: Exception | None = None
        self._abandoned = False
        self._steps = [self._begin, self._write, self._publish]

    @property
    def done(self) -> bool:
        """Whether no step is left: the checkpoint is published, or the save has failed."""
        return not self._steps

    def work(self) -> None:
        """Do this rank's share of the current step; keep an error for :meth:`settle`."""
        try:
            self._steps[0]()
        except Exception as error:
            self._error = error

    def settle(self) -> None:
        """Agree that the step is done; every rank calls it, from its main thread, after :meth:`work`.

        Raises:
            StorageError: the same on all ranks: a disk is full or refuses.
            CheckpointError: the same on all ranks, if any of them failed otherwise. In either case nothing stands
                under the final name, and the checkpoint before is unchanged.
        """
        try:
            self._peers.agree(self._error, f"saving {self.folder}")
        except CheckpointError:
            self._steps = []
            if self._peers.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        if self._part is not None:
            self._parts, self._part = self._peers.collect(index_text(self._part).encode()), None
        self._steps = self._steps[1:]

    def finish(self) -> None:
        """Do the remaining steps; every rank calls it.

        Raises:
            CheckpointError: as :meth:`settle`.
        """
        while not self.done:
            self.work()
            self.settle()

    def abandon(self) -> None:
        """Make :meth:`work`, in another thread, fail at the next tensor; nothing is published.

        The ``.partial`` folder stays, since other ranks may still be writing there; the next save clears it.
        """
        self._abandoned = True

    def _begin(self) -> None:
        if self._peers.rank == 0:
            self._root.mkdir(parents=True, exist_ok=True)
            # Left by a run that was killed while it saved or deleted, or by a file in use. A folder that still cannot
            # be removed stands in the way of its own iteration only.
            for stale in (*self._root.glob(".iter_*.partial"), *self._root.glob(".iter_*.deleted")):
                shutil.rmtree(stale, ignore_errors=True)
            self._partial.mkdir()
        self._pieces = self._take(self._pieces)

    def _write(self) -> None:
        pieces, self._pieces = self._pieces, ()
        self._part = write_rank_file(
            self._partial, pieces, rank=self._peers.rank, world_size=self._peers.world_size, on_bytes=self._go_on
        )

    def _go_on(self, _: int) -> None:
        if self._abandoned:
            raise CheckpointError(f"{self._partial} was abandoned")

    def _publish(self) -> None:
        if self._peers.rank:
            return
        parts, self._parts = [parse_index(part.decode(), self._partial) for part in self._parts], []
        write_index(self._partial, merge_parts(parts))
        adapter, model = self._adapter, self._model_config
        _require_tensors(self._partial, parameter_shapes(model) if adapter is None else adapter.shapes(model))
        finish_folder(self._partial, model, self._state, adapter)
        sync_folder(self._partial)
        publish_folder(
            self._partial, self.folder, aside=set_aside(self.folder),
            commit=lambda: write_tracker(self._root, self._iteration),
        )
        _set_later_aside(self._root, self._iteration)
        _delete_surplus(self._root, self._iteration, self._retention)


def finish_folder(
    folder: Path, model_config: ModelConfig, state: Mapping[str, Any], adapter: AdapterRecord | None = None
) -> None:
    """Write a checkpoint's other files, after its tensors and their index; the manifest last."""
    documents = {MODEL_CONFIG_NAME: model_config.to_json(), STATE_NAME: dict(state)}
    if adapter is not None:
        documents[ADAPTER_NAME] = adapter.to_json()
    for name, values in documents.items():
        atomic_write_json(folder / name, values)
    write_manifest(folder, documents)


def write_tracker(root: Path, iteration: int) -> None:
    """Name the latest iteration in the run's tracker file."""
    atomic_write_text(root / TRACKER_NAME, f"{iteration}\n")


def _require_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the written tensors of the model with the names and shapes that there must be.

    A slice without its tensor-parallel tag would pass for the whole tensor, and a forgotten layer would go unnoticed: a
    checkpoint that no layout could load must not replace a whole one.
    """
    stored = {
        key.removeprefix(MODEL_PREFIX): tensor.shape
        for key, tensor in read_index(folder).tensors.items()
        if key.startswith(MODEL_PREFIX)
    }
    for name in sorted(expected.keys() | stored.keys()):
        wanted, written = expected.get(name, "none"), stored.get(name, "none")
        if wanted != written:
            raise CheckpointError(
                f"tensor {name} has shape {wanted} in this model, but {written} was written; "
                "the parameter's place in the layout is described wrongly"
            )


def _set_later_aside(root: Path, iteration: int) -> None:
    """Rename later checkpoints, which a run left that was set back to an earlier iteration.

    They may be damaged, and once this run passes their iterations nobody could tell them from its own.
    """
    for later in (number for number in published_iterations(root) if number > iteration):
        folder = root / iteration_folder(later)
        places = (folder.with_name(f"{folder.name}.superseded{number or ''}") for number in itertools.count())
        place = next(place for place in places if not place.exists())
        try:
            os.rename(folder, place)
        except OSError as error:
            logger.warning("cannot set %s aside, which an earlier run has left: %s", folder, error)
        else:
            logger.warning("renamed %s, which an earlier run has left, to %s", folder, place.name)


def _delete_surplus(root: Path, newest: int, retention: Retention) -> None:
    try:
        surplus = retention.surplus(published_iterations(root), newest)
    except OSError as error:
        logger.warning("cannot read %s to delete surplus checkpoints: %s", root, error)
        return
    for iteration in surplus:
        delete_checkpoint(root / iteration_folder(iteration))
