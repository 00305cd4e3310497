"""What each rank of a layout holds: of a run, and of one that is only planned, by building each part without memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_flashi2v.models.stages import Stage
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.parallel.regions import rows_per_rank


@dataclass(frozen=True)
class Holding:
    """What a rank holds; tensor, context and data ranks of one place in the pipeline hold equally much.

    Attributes:
        stages: its parts of the model.
        parameters: values in its tensors, or in those that it and others keep stretches of.
        bf16_parameters: those of them in bfloat16.
        trained: values in those tensors that are not frozen.
        bf16_trained: those of them in bfloat16.
        largest_block: values in its largest block.
        largest_block_bf16: those of them in bfloat16.
        outside_blocks: bytes of the weights outside of blocks.
        tokens: visual tokens of one sample, of the largest there are, padding included.
    """

    stages: tuple[Stage, ...]
    parameters: int
    bf16_parameters: int
    trained: int
    bf16_trained: int
    largest_block: int
    largest_block_bf16: int
    outside_blocks: int
    tokens: int


def holding_of(
    stages: Sequence[DiffusionTransformer],
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    latent_shapes: Sequence[tuple[int, int, int]],
) -> Holding:
    """What the rank of these stages holds.

    Args:
        stages: this rank's, built.
        shapes: of its parameters, with their dtypes, by name; see :func:`parameter_shapes_of`.
        latent_shapes: latent frames, rows and columns of the samples, one for each size.
    """
    tokens = max(math.prod(stages[0].grid(shape)) for shape in latent_shapes)
    values, halves, outside = Counter[str](), Counter[str](), 0
    for name, (shape, dtype) in shapes.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
        values[part] += math.prod(shape)
        halves[part] += math.prod(shape) if dtype == torch.bfloat16 else 0
        outside += 0 if part else math.prod(shape) * dtype.itemsize
    trained = [math.prod(shapes[name][0]) for name in _trained(stages)]
    bf16_trained = [math.prod(shapes[name][0]) for name in _trained(stages) if shapes[name][1] == torch.bfloat16]
    block = max((part for part in values if part), key=lambda part: values[part])
    return Holding(
        stages=tuple(model.stage for model in stages),
        parameters=values.total(),
        bf16_parameters=halves.total(),
        trained=sum(trained),
        bf16_trained=sum(bf16_trained),
        largest_block=values[block],
        largest_block_bf16=halves[block],
        outside_blocks=outside,
        tokens=rows_per_rank(tokens, stages[0].spec.groups),
    )


def _trained(stages: Sequence[DiffusionTransformer]) -> list[str]:
    return [name for model in stages for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_shapes_of(stages: Sequence[DiffusionTransformer]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the parameters of stages that no data parallelism has divided."""
    return {name: (tuple(parameter.shape), parameter.dtype)
            for model in stages for name, parameter in model.named_parameters()}


def held_by_all(mine: Holding, place: int, sharing: int = 1) -> list[str]:
    """One line for each place in the pipeline: what its ranks hold. Collective; gathers four numbers of each rank.

    Args:
        mine: this rank's.
        place: this rank's in the pipeline.
        sharing: ranks that each keep a stretch of the parameters.
    """
    divided = f", of which it keeps one of {sharing} parts," if sharing > 1 else ""
    numbers = [place, sum(len(stage.layers) for stage in mine.stages), mine.parameters, mine.tokens]
    alike = Counter(tuple(found) for found in gather_json(numbers))
    return [
        f"pipeline rank {where}: each of {count} ranks holds {blocks} blocks, {parameters:,} parameters{divided} and "
        f"{tokens:,} visual tokens of a sample"
        for (where, blocks, parameters, tokens), count in sorted(alike.items())
    ]
