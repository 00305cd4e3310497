"""Every block lies on exactly one stage, in order, and ranks take the stages in turn."""

from __future__ import annotations

import pytest

from megatron_flashi2v.config.layout import stage_layer_counts
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.models.stages import Stage, stages_of_rank, whole_model


@pytest.mark.parametrize("counts, pipeline", [((4,), 1), ((2, 2), 2), ((1, 2, 1), 3), ((3, 1, 2, 2), 2), ((1,) * 6, 3)])
def test_stages_hold_all_blocks_in_order(counts: tuple[int, ...], pipeline: int) -> None:
    by_index = {
        stage.index: stage for rank in range(pipeline) for stage in stages_of_rank(counts, pipeline, rank)
    }
    assert sorted(by_index) == list(range(len(counts)))
    assert tuple(len(by_index[index].layers) for index in range(len(counts))) == counts
    assert [layer for index in range(len(counts)) for layer in by_index[index].layers] == list(range(sum(counts)))
    assert [index for index, stage in by_index.items() if stage.is_first] == [0]
    assert [index for index, stage in by_index.items() if stage.is_last] == [len(counts) - 1]


def test_interleaved_ranks_take_stages_in_turn() -> None:
    assert stages_of_rank((1, 1, 1, 1), 2, 1) == [Stage(1, 4, range(1, 2)), Stage(3, 4, range(3, 4))]


def test_an_uneven_split_over_virtual_stages() -> None:
    parallel = ParallelArguments(
        pipeline_model_parallel_size=3, num_virtual_stages_per_pipeline_rank=2, pipeline_layer_split="2,1,1,1,1,1"
    )
    counts = stage_layer_counts(parallel, 7)
    assert counts == (2, 1, 1, 1, 1, 1)
    assert [[list(stage.layers) for stage in stages_of_rank(counts, 3, rank)] for rank in range(3)] == [
        [[0, 1], [4]], [[2], [5]], [[3], [6]],
    ]


def test_an_undivided_model_is_first_and_last() -> None:
    stage = whole_model(5)
    assert stage.is_first and stage.is_last and list(stage.layers) == [0, 1, 2, 3, 4]
