"""Boxes of sharded parameters: a rank's place, and slices that together are the whole tensor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_flashi2v.parallel.placement import ShardGrid, box_of_shard, shard_grid


def group(size: int, rank: int) -> SimpleNamespace:
    """Stands in for a process group."""
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def test_the_grid_is_tensor_ranks_by_replicas_and_context_ranks() -> None:
    grid = shard_grid(SimpleNamespace(tp=group(4, 3), dp_cp=group(6, 5)))
    assert (grid.tp_rank, grid.tp_size, grid.dp_rank, grid.dp_size) == (3, 4, 5, 6)


@pytest.mark.parametrize("place", [{"tp_rank": 2, "tp_size": 2}, {"dp_rank": -1}, {"tp_size": 0}])
def test_a_place_must_exist(place: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no such place"):
        ShardGrid(**place)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_ranks_boxes_are_torchs_chunks(dim: int) -> None:
    whole = torch.arange(4 * 8 * 12).view(4, 8, 12)
    for rank, chunk in enumerate(whole.chunk(4, dim=dim)):
        box = box_of_shard(chunk.shape, dim, ShardGrid(tp_rank=rank, tp_size=4))
        assert box.global_shape == tuple(whole.shape) and box.shape == tuple(chunk.shape) and box.first_of_tp
        assert torch.equal(whole[box.slices], chunk)


def test_the_first_tensor_rank_stands_for_a_whole_tensor() -> None:
    boxes = [box_of_shard((3, 5), None, ShardGrid(tp_rank=rank, tp_size=3)) for rank in range(3)]
    assert [box.first_of_tp for box in boxes] == [True, False, False]
    assert all(box.global_shape == box.shape == (3, 5) and box.offset == (0, 0) for box in boxes)
    assert torch.zeros(())[box_of_shard((), None, ShardGrid()).slices].shape == ()


def test_a_dimension_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"dimension 1 is sharded, but the parameter has the shape \(4,\)"):
        box_of_shard((4,), 1, ShardGrid())
