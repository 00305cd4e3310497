"""Every block lies on exactly one stage, in order."""

from __future__ import annotations

import pytest

from megatron_flashi2v.models.stages import stage_layers


@pytest.mark.parametrize("layers, stages", [(4, 1), (4, 2), (40, 8), (30, 5), (3, 3)])
def test_stages_hold_all_blocks_in_order(layers: int, stages: int) -> None:
    held = [stage_layers(layers, stages, stage) for stage in range(stages)]
    assert [index for part in held for index in part] == list(range(layers))
    assert {len(part) for part in held} == {layers // stages}


def test_uneven_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="30 blocks do not divide over 4"):
        stage_layers(30, 4, 0)
