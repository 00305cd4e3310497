"""Replicas of a model that work on different things, each at its own pace; and models that share one thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.parallel.groups import Groups

Item = TypeVar("Item")

PATIENCE = timedelta(days=30)
"""How long replicas wait for the slowest; a launcher stops them where a process has failed."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """This rank's place among replicas, of one or more models each.

    Attributes:
        index: of the replica.
        count: replicas.
        is_first: whether this rank is the first of its replica, which writes what all of them have made.
        models: ranks of this rank's place in each of the replica's models, in their order; None where it has one.
    """

    index: int
    count: int
    is_first: bool
    models: dist.ProcessGroup | None = None

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This replica's part of a list: neighbours, as many as the others have, or one more."""
        first, last = (len(items) * part // self.count for part in (self.index, self.index + 1))
        return items[first:last]


def divide_replicas(groups: Groups, models: int, timeout_minutes: float) -> Replica:
    """Join data-parallel neighbours to replicas of several models; collective over all ranks.

    Args:
        groups: this rank's; the size of ``dp`` is a multiple of ``models``.
        models: in each replica.
        timeout_minutes: of the collectives among them.
    """
    place = groups.dp.rank()
    return Replica(
        index=place // models,
        count=groups.dp.size() // models,
        is_first=not (place % models or groups.tp.rank() or groups.cp.rank() or groups.pp.rank()),
        models=None if models == 1 else _neighbours(groups.dp, models, timedelta(minutes=timeout_minutes)),
    )


def _neighbours(dp: dist.ProcessGroup, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """This rank's group of ``size`` neighbours in ``dp``; all ranks make all groups, in one order."""
    columns = sorted({tuple(ranks) for ranks in gather_json(dist.get_process_group_ranks(dp))})
    parts = [column[first : first + size] for column in columns for first in range(0, len(column), size)]
    made = {part: dist.new_group(list(part), timeout=timeout) for part in parts}
    (own,) = (group for part, group in made.items() if dist.get_rank() in part)
    return own


@contextlib.contextmanager
def own_pace() -> Iterator[None]:
    """Let replicas work without exchanges; whoever ends first waits for the others, however long; collective.

    A rank that fails does not wait.
    """
    # On the host: the accelerator's collectives end by the timeout of the whole job.
    everyone = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield
    dist.barrier(group=everyone)
