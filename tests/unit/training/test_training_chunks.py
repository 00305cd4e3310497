"""From flags to the recomputed blocks of a stage."""

from __future__ import annotations

import pytest

from megatron_flashi2v.config.train import RecomputeArguments
from megatron_flashi2v.models.recompute import Recompute
from megatron_flashi2v.training.chunks import recompute_of


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
