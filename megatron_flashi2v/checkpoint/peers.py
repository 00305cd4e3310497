"""The ranks that share a checkpoint: one rank's error never leaves the others waiting."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_flashi2v.config.errors import CheckpointError, StorageError
from megatron_flashi2v.parallel import agreement
from megatron_flashi2v.parallel.agreement import Failure


class Peers:
    """The ranks that write or load one checkpoint together; a process of its own exchanges nothing.

    Args:
        rank: this rank's place in the group.
        world_size: ranks in the group.
        group: process group, of any backend; None is the default group.
    """

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None = None) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not within a world of {world_size}")
        self.rank = rank
        self.world_size = world_size
        self._group = group

    def collect(self, data: bytes) -> list[bytes]:
        """Every rank's bytes in rank order on rank 0; an empty list elsewhere."""
        return [data] if self.world_size == 1 else agreement.collect_bytes(data, self._group)

    def share(self, value: Any) -> Any:
        """Rank 0's JSON-ready value, on every rank."""
        return value if self.world_size == 1 else agreement.share_json(value, self._group)

    def first_failure(self, error: Exception | None) -> Failure | None:
        """The first rank's error, the same on all ranks; every rank calls it at the same point.

        Args:
            error: what went wrong on this rank, if anything.
        """
        return agreement.first_failure(error, self._gather)

    def agree(self, error: Exception | None, doing: str) -> None:
        """Raise on all ranks if any of them has an error; every rank calls it at the same point.

        Args:
            error: what went wrong on this rank, if anything.
            doing: the work, for the message, such as "saving runs/a/iter_0000010".

        Raises:
            StorageError: all errors are the storage's: the disk is full, or refuses.
            CheckpointError: other errors. Either is the same on every rank, and names the first failing rank and its
                error.
        """
        failure = self.first_failure(error)
        if failure is not None:
            kind = StorageError if failure.of_storage else CheckpointError
            raise kind(f"{doing} failed: {failure.message}") from error

    def _gather(self, data: bytes) -> list[bytes]:
        return [data] if self.world_size == 1 else agreement.gather_bytes(data, self._group)
