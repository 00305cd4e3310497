"""When a run's checkpoints are written: at once, while training waits, or beside it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.host_copies import HostCopies
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.retention import KEEP_ALL, Retention
from megatron_flashi2v.checkpoint.saving import CheckpointSave
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.errors import StorageError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import CheckpointArguments
from megatron_flashi2v.runtime.device import Device, bind_thread
from megatron_flashi2v.runtime.logging import AGREED

WAIT_WORTH_TELLING_S = 1.0
ABANDON_S = 5.0
"""How long a failing run waits for its thread, which ends between two tensors, or with the flush of a file."""

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes a run's checkpoints; every rank calls the same methods at the same points, between two iterations.

    Under ``--async-save`` training waits only while each rank copies what it writes to host memory. A thread then
    works on the save, one step after the other. It talks to no other rank: that its step is done travels with the
    loss of an iteration (:meth:`working`), and when the last rank's is, all ranks agree on it (:meth:`advance`).

    Args:
        arguments: where to, and which checkpoints to keep.
        model_config: the model.
        peers: all ranks.
        device: what they train on.
        adapter: what of the model is saved, where it is not all of it.
    """

    def __init__(
        self, arguments: CheckpointArguments, model_config: ModelConfig, peers: Peers, device: Device,
        adapter: AdapterRecord | None = None,
    ) -> None:
        self._arguments, self._model_config, self._peers = arguments, model_config, peers
        self._adapter = adapter
        self._retention = Retention(last=arguments.keep_last, every=arguments.keep_every)
        self._copies, self._device = HostCopies(device), device.torch_device
        self._save: CheckpointSave | None = None
        self._thread: threading.Thread | None = None
        self._reserving: threading.Thread | None = None
        self._blocked_s = 0.0

    def reserve(self, pieces: Callable[[], list[TensorPiece]]) -> None:
        """Begin to get the host memory for copies, if any will be made, so that the first save need not wait for it.

        Args:
            pieces: what this rank holds, asked for once; there should have been an update, which makes moments.
        """
        arguments = self._arguments
        if self._reserving is None and arguments.async_save and arguments.save and arguments.save_interval:
            self._reserving = threading.Thread(target=self._reserve, args=(pieces(),), name="reserve", daemon=True)
            self._reserving.start()

    def _reserve(self, pieces: list[TensorPiece]) -> None:
        bind_thread(self._device)
        # Where there is not enough, the save will say so on all ranks.
        with contextlib.suppress(UserError):
            self._copies.reserve(pieces)

    def save(
        self,
        iteration: int,
        pieces: Iterable[TensorPiece],
        state: Mapping[str, Any],
        *,
        last: bool = True,
        delete_older: bool = True,
    ) -> None:
        """Begin a checkpoint, once the one before is published, and finish it if it is the run's last.

        A full disk costs a checkpoint, with a warning; the run's last one is an error.

        Args:
            iteration: iterations done.
            pieces: what this rank holds.
            state: JSON-ready values that are the same on all ranks.
            last: whether training ends here, so that there is nothing to be done beside it.
            delete_older: whether older ones that are not to be kept go.

        Raises:
            StorageError: on all ranks: the last checkpoint cannot be written.
            CheckpointError: on all ranks: pieces do not fit together; never because of the disk.
        """
        assert self._arguments.save is not None
        beside = self._arguments.async_save and not last
        self.finish()
        self._save = save = CheckpointSave(
            self._arguments.save, iteration, pieces=pieces, model_config=self._model_config,
            adapter=self._adapter, state=state,
            retention=self._retention if delete_older else KEEP_ALL, peers=self._peers,
            take=self._copies.take if beside else list,
        )
        self._blocked_s = 0.0
        with self._training_waits(failure_ends_run=last):
            if beside:
                if self._reserving is not None:
                    self._reserving.join()
                save.work()
                save.settle()
                self._work_beside(save)
            else:
                save.finish()

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is under way; the same on all ranks."""
        return self._save is not None

    def working(self) -> int:
        """1 while this rank's thread works, or else 0; the ranks' sum is what :meth:`advance` wants."""
        return int(self._thread is not None and self._thread.is_alive())

    def advance(self, working: int) -> None:
        """Go on with the save that is under way, if there is one and no rank works on it any longer.

        Args:
            working: ranks whose thread worked when they were asked.

        Raises:
            CheckpointError: on all ranks: pieces do not fit together.
        """
        save = self._save
        if save is None or working:
            return
        with self._training_waits():
            save.settle()
            if not save.done:
                self._work_beside(save)

    def finish(self) -> None:
        """Wait until the save that is under way, if there is one, is published.

        Raises:
            CheckpointError: on all ranks: pieces do not fit together.
        """
        save, thread = self._save, self._thread
        if save is None or thread is None:
            return
        start = time.perf_counter()
        with self._training_waits():
            thread.join()
            save.settle()
            save.finish()
        waited = time.perf_counter() - start
        if waited >= WAIT_WORTH_TELLING_S:
            logger.warning("training waited %.1f s for %s, which was still being written; if that happens with each "
                           "checkpoint, --save-interval is too short for this disk", waited, save.folder, extra=AGREED)

    def abandon(self) -> None:
        """Leave without the other ranks, when this one fails: what is under way is not published."""
        if self._save is not None and self._thread is not None:
            self._save.abandon()
            self._thread.join(ABANDON_S)

    def _work_beside(self, save: CheckpointSave) -> None:
        def work() -> None:
            bind_thread(self._device)
            save.work()

        # A daemon: a run that fails must not wait for a disk that hangs.
        self._thread = threading.Thread(target=work, name="save", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def _training_waits(self, *, failure_ends_run: bool = False) -> Iterator[None]:
        """Around what is done on the present save while training waits: its time, its failure and its end."""
        save, start = self._save, time.perf_counter()
        assert save is not None
        try:
            yield
        except StorageError as error:
            if failure_ends_run:
                raise
            logger.warning("%s; the run goes on, and what is saved stays as it was", error, extra=AGREED)
        else:
            if save.done:
                seconds = self._blocked_s + time.perf_counter() - start
                logger.info("saved %s; training was blocked for %.2f s", save.folder, seconds)
        finally:
            self._blocked_s += time.perf_counter() - start
            if save.done:
                self._save = self._thread = None
