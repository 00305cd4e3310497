"""How the ranks that share a checkpoint agree, so that one rank's error never leaves the others waiting."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_flashi2v.config.errors import CheckpointError, UserError


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

    def agree(self, error: Exception | None, doing: str) -> None:
        """Raise on all ranks if any of them has an error; every rank must call it at the same point.

        Args:
            error: what went wrong on this rank, if anything.
            doing: what was being done, for the message, such as "saving runs/a/iter_0000010".

        Raises:
            CheckpointError: the same message on every rank; it names the first failing rank and its error.
        """
        message = None if error is None else _describe(error)
        messages: list[str | None] = [message]
        if self.world_size > 1:
            messages = [None] * self.world_size
            dist.all_gather_object(messages, message, group=self._group)
        failed = [rank for rank, text in enumerate(messages) if text is not None]
        if not failed:
            return
        where = (
            f" (rank {failed[0]} of {self.world_size}; {len(failed)} failed)" if self.world_size > 1 else ""
        )
        raise CheckpointError(f"{doing} failed: {messages[failed[0]]}{where}") from error


def _describe(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
