"""How the ranks that share a checkpoint agree, so that one rank's error never leaves the others waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_flashi2v.config.errors import CheckpointError, StorageError, UserError, WriteError


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What failed on some rank.

    Attributes:
        message: the first failing rank's, with the rank.
        of_storage: whether every failing rank's storage is to blame: a full disk, a missing permission.
    """

    message: str
    of_storage: bool


class Peers:
    """The ranks that write one checkpoint together; a single process needs no ``torch.distributed``.

    Args:
        rank: this rank's place in the group.
        world_size: ranks in the group.
        group: process group that can exchange objects (gloo is cheapest); None is the default group.
    """

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None = None) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not within a world of {world_size}")
        self.rank = rank
        self.world_size = world_size
        self._group = group

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` in rank order on rank 0; an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        root = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        dist.gather_object(value, values, dst=root, group=self._group)
        return values or []

    def share(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        root = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        dist.broadcast_object_list(values, src=root, group=self._group)
        return values[0]

    def first_failure(self, error: Exception | None) -> Failure | None:
        """The first rank's error, the same on all ranks; every rank must call it at the same point.

        Args:
            error: what went wrong on this rank, if anything.
        """
        own = None if error is None else (_describe(error), _is_of_storage(error))
        found: list[tuple[str, bool] | None] = [own]
        if self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, own, group=self._group)
        failed = [(rank, *problem) for rank, problem in enumerate(found) if problem is not None]
        if not failed:
            return None
        rank, message, _ = failed[0]
        if self.world_size > 1:
            message += f" (rank {rank} of {self.world_size}; {len(failed)} failed)"
        return Failure(message=message, of_storage=all(of_storage for *_, of_storage in failed))

    def agree(self, error: Exception | None, doing: str) -> None:
        """Raise on all ranks if any of them has an error; every rank must call it at the same point.

        Args:
            error: what went wrong on this rank, if anything.
            doing: what was being done, for the message, such as "saving runs/a/iter_0000010".

        Raises:
            StorageError: all errors are the storage's: the disk is full, or refuses.
            CheckpointError: other errors. Either is the same on every rank, and names the first failing rank and its
                error.
        """
        failure = self.first_failure(error)
        if failure is not None:
            kind = StorageError if failure.of_storage else CheckpointError
            raise kind(f"{doing} failed: {failure.message}") from error


def _describe(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _is_of_storage(error: Exception) -> bool:
    return isinstance(error, (OSError, StorageError, WriteError))
