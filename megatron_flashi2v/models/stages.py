"""Which part of the model a rank holds: one stage, or several under the interleaved schedule.

The blocks are cut into PP x V stages, numbered in the order in which the activation passes them. Rank p of PP pipeline
ranks holds stages p, p + PP, p + 2 PP, ...: one for each of V rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One part of the model.

    Attributes:
        index: place in the order of the activation.
        count: stages of the whole model.
        layers: global indices of its blocks.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Whether it embeds the inputs."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it holds the head, and so computes the loss."""
        return self.index == self.count - 1


def whole_model(num_layers: int) -> Stage:
    """The only stage of a model that is not divided."""
    return Stage(0, 1, range(num_layers))


def stages_of_rank(layer_counts: Sequence[int], pipeline_size: int, pipeline_rank: int) -> list[Stage]:
    """The stages that one pipeline rank holds, in the order in which the activation comes by.

    Args:
        layer_counts: blocks of every stage in the activation's order; a multiple of ``pipeline_size`` of them.
        pipeline_size: ranks of the pipeline.
        pipeline_rank: this one.
    """
    bounds = [0]
    for count in layer_counts:
        bounds.append(bounds[-1] + count)
    return [
        Stage(index, len(layer_counts), range(bounds[index], bounds[index + 1]))
        for index in range(pipeline_rank, len(layer_counts), pipeline_size)
    ]
