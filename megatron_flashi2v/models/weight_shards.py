"""The weights that a rank holds, whole or in stretches: what fills them, and what a checkpoint writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from megatron_flashi2v.models.placement import parameter_box
from megatron_flashi2v.parallel.fully_sharded import FullyShardedStage
from megatron_flashi2v.parallel.placement import ParameterBox, ShardGrid


@dataclass(frozen=True, kw_only=True)
class WeightShard:
    """Values of one parameter, and the memory that holds them.

    Attributes:
        name: global name.
        box: where the tensor-parallel rank's parameter lies in the global tensor.
        flat_range: half-open stretch of the box's row-major order; None is all of it.
        owner: whether this rank writes these values to a checkpoint; replicas do not.
        data: the values: box-shaped, or 1-D under ``flat_range``.
    """

    name: str
    box: ParameterBox
    flat_range: tuple[int, int] | None = None
    owner: bool
    data: Tensor

    def part_of(self, box_values: Tensor) -> Tensor:
        """The values, of all those of the box, that ``data`` stands for."""
        if self.flat_range is None:
            return box_values
        start, stop = self.flat_range
        return box_values.reshape(-1)[start:stop]


def whole_weights(named_parameters: Iterable[tuple[str, nn.Parameter]], grid: ShardGrid) -> list[WeightShard]:
    """Weights of which every replica holds all.

    Args:
        named_parameters: global names (global layer indices, no wrapper's prefix) and this rank's parameters.
        grid: this rank's place.
    """
    shards = []
    for name, parameter in named_parameters:
        box = parameter_box(name, parameter.shape, grid)
        owner = box.first_of_tp and grid.dp_rank == 0
        shards.append(WeightShard(name=name, box=box, owner=owner, data=parameter.detach()))
    return shards


def held_weights(stages: Iterable[FullyShardedStage], grid: ShardGrid) -> list[WeightShard]:
    """What a rank of fully sharded stages keeps of the weights, to be filled; no rank writes it."""
    return [
        WeightShard(name=parameter.name, box=parameter_box(parameter.name, parameter.shape, grid),
                    flat_range=parameter.held_stretch, owner=False, data=parameter.held_weights)
        for stage in stages for parameter in stage.parameters_of_rank()
    ]


def updated_weights(stages: Iterable[FullyShardedStage], grid: ShardGrid) -> list[WeightShard]:
    """What a rank of fully sharded stages updates of the weights, and, in the first optimizer instance, writes."""
    shards = []
    for stage in stages:
        for parameter in stage.parameters_of_rank():
            box = parameter_box(parameter.name, parameter.shape, grid)
            owner = box.first_of_tp and stage.is_first_instance
            shards.append(WeightShard(name=parameter.name, box=box, flat_range=parameter.stretch, owner=owner,
                                      data=parameter.weights))
    return [shard for shard in shards if shard.data.numel()]
