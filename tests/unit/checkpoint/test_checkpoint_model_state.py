"""A rank's place in the model as its checkpoints have it."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_flashi2v.checkpoint.model_state import shard_grid


def group(size: int, rank: int) -> SimpleNamespace:
    """Stands in for a process group."""
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def test_a_ranks_place_as_checkpoints_see_it() -> None:
    grid = shard_grid(SimpleNamespace(tp=group(4, 3), dp_cp=group(6, 5)))
    assert (grid.tp_rank, grid.tp_size, grid.dp_rank, grid.dp_size) == (3, 4, 5, 6)
