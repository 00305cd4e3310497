"""Which blocks a pipeline stage holds."""

from __future__ import annotations


def stage_layers(num_layers: int, stages: int, stage: int) -> range:
    """Global indices of the stage's blocks; every stage holds as many.

    Raises:
        ValueError: the blocks do not divide evenly.
    """
    if num_layers % stages:
        raise ValueError(f"{num_layers} blocks do not divide over {stages} pipeline stages")
    per_stage = num_layers // stages
    return range(stage * per_stage, (stage + 1) * per_stage)
