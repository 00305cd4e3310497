"""What the trainer makes of flags: recomputed blocks of a stage, and the checkpoint's view of a rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_flashi2v.checkpoint.model_state import shard_grid
from megatron_flashi2v.config.train import RecomputeArguments
from megatron_flashi2v.models.recompute import Recompute
from megatron_flashi2v.training.chunks import recompute_of


def group(size: int, rank: int = 0) -> SimpleNamespace:
    """Stands in for a process group."""
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


@pytest.mark.parametrize("granularity, method, count, expected", [
    (None, "uniform", 1, Recompute(layers=0)),
    ("full", "uniform", 1, Recompute(layers=4, group=1)),
    ("full", "uniform", 3, Recompute(layers=4, group=3)),
    ("full", "block", 3, Recompute(layers=3, group=1)),
    ("full", "block", 9, Recompute(layers=4, group=1)),
    ("selective", "uniform", 1, Recompute(inside="selective")),
    ("skip_attention", "uniform", 1, Recompute(inside="skip_attention")),
])
def test_recomputed_blocks_of_a_stage_of_four(
    granularity: str | None, method: str, count: int, expected: Recompute
) -> None:
    arguments = RecomputeArguments(
        recompute_granularity=granularity, recompute_method=method, recompute_num_layers=count
    )
    assert recompute_of(arguments, 4) == expected


def test_a_ranks_place_as_checkpoints_see_it() -> None:
    grid = shard_grid(SimpleNamespace(tp=group(4, 3), dp_cp=group(6, 5)))
    assert (grid.tp_rank, grid.tp_size, grid.dp_rank, grid.dp_size) == (3, 4, 5, 6)
