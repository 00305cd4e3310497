"""What each rank of a layout holds: of a run, and of one that is only planned, by building each part without memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_flashi2v.models.stages import Stage
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.parallel.regions import rows_per_rank


@dataclass(frozen=True)
class Holding:
    """What a rank holds; tensor, context and data ranks of one place in the pipeline hold equally much.

    Attributes:
        stages: its parts of the model.
        parameters: values in its tensors.
        weight_bytes: size of these tensors.
        tokens: visual tokens of one sample, of the largest there are, padding included.
    """

    stages: tuple[Stage, ...]
    parameters: int
    weight_bytes: int
    tokens: int


def holding_of(stages: Sequence[DiffusionTransformer], latent_shapes: Sequence[tuple[int, int, int]]) -> Holding:
    """What the rank of these stages holds.

    Args:
        stages: this rank's, built.
        latent_shapes: latent frames, rows and columns of the samples, one for each size.
    """
    tokens = max(math.prod(stages[0].grid(shape)) for shape in latent_shapes)
    parameters = [parameter for model in stages for parameter in model.parameters()]
    return Holding(
        stages=tuple(model.stage for model in stages),
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        tokens=rows_per_rank(tokens, stages[0].spec.groups),
    )


def held_by_all(mine: Holding, place: int) -> list[str]:
    """One line for each place in the pipeline: what its ranks hold. Collective; gathers four numbers of each rank.

    Args:
        mine: this rank's.
        place: this rank's in the pipeline.
    """
    numbers = [place, sum(len(stage.layers) for stage in mine.stages), mine.parameters, mine.tokens]
    alike = Counter(tuple(found) for found in gather_json(numbers))
    return [
        f"pipeline rank {where}: each of {count} ranks holds {blocks} blocks, {parameters:,} parameters and {tokens:,} "
        "visual tokens of a sample"
        for (where, blocks, parameters, tokens), count in sorted(alike.items())
    ]
