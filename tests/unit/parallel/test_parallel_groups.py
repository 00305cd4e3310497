"""Which ranks form the groups of context parallelism, by a fake process group of the whole cluster."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megatron_flashi2v.config.hccl import GROUP_DESCRIPTIONS
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import world
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.distributed import init_without_peers
from megatron_flashi2v.runtime.launch import LaunchEnvironment


def groups_of(rank: int, world_size: int, **parallel: object) -> contextlib.AbstractContextManager[Groups]:
    launch = LaunchEnvironment(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    layout = ParallelArguments(**parallel)  # type: ignore[arg-type]
    return world(resolve_device("cpu"), launch, layout, start=init_without_peers)


def members(rank: int, world_size: int, **parallel: object) -> dict[str, list[int]]:
    """Global ranks of the groups that ``rank`` is in; [] where it has none."""
    with groups_of(rank, world_size, **parallel) as groups:
        found = {"cp": groups.cp, "ulysses": groups.ulysses, "ring": groups.ring}
        return {
            name: [] if group is None else torch.distributed.get_process_group_ranks(group)
            for name, group in found.items()
        }


USP = {"context_parallel_algo": "usp", "ulysses_degree": 2}


@pytest.mark.parametrize("rank, world_size, parallel, expected", [
    (0, 1, {}, ([0], [], [])),
    (1, 4, {"context_parallel_size": 2}, ([0, 1], [0, 1], [])),
    (1, 4, {"context_parallel_size": 2, "context_parallel_algo": "ring"}, ([0, 1], [], [0, 1])),
    (1, 4, {"context_parallel_size": 4, **USP}, ([0, 1, 2, 3], [0, 1], [1, 3])),
    (9, 12, {"context_parallel_size": 6, **USP}, ([6, 7, 8, 9, 10, 11], [8, 9], [7, 9, 11])),
    # Tensor-parallel ranks are the closest neighbours, then Ulysses', then the ring's.
    (12, 16, {"tensor_model_parallel_size": 2, "context_parallel_size": 4, **USP},
     ([8, 10, 12, 14], [12, 14], [8, 12])),
    (2, 8, {"context_parallel_size": 4, "context_parallel_algo": "usp", "ulysses_degree": 4},
     ([0, 1, 2, 3], [0, 1, 2, 3], [])),
    (2, 8, {"context_parallel_size": 4, "context_parallel_algo": "usp", "ulysses_degree": 1},
     ([0, 1, 2, 3], [], [0, 1, 2, 3])),
])
def test_ulysses_ranks_are_neighbours_and_the_ring_is_across(
    rank: int, world_size: int, parallel: dict[str, object], expected: tuple[list[int], list[int], list[int]]
) -> None:
    assert members(rank, world_size, **parallel) == dict(zip(("cp", "ulysses", "ring"), expected, strict=True))


def test_buffer_sizes_reach_the_groups_that_their_names_say() -> None:
    """By the descriptions that torch and megatron-core really give."""
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 4}
    with groups_of(0, 32, **layout, **USP) as groups:
        everyone = torch.distributed.distributed_c10d._get_default_group()
        assert (everyone.group_desc,) == GROUP_DESCRIPTIONS["world"]
        context = {group.group_desc for group in (groups.cp, groups.ulysses, groups.ring) if group is not None}
        assert context == set(GROUP_DESCRIPTIONS["cp"])
        for name in ("tp", "pp", "dp", "dp_cp", "mp", "tp_cp", "tp_dp_cp"):
            assert (getattr(groups.collection, name).group_desc,) == GROUP_DESCRIPTIONS[name]
