"""Where a rank's slice of a parameter lies in the whole tensor: arithmetic on shapes, without models and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports megatron-core, for which converting a checkpoint need not wait
    from megatron_flashi2v.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class ShardGrid:
    """A rank's place in the layout, as far as it decides which values the rank holds.

    Pipeline stages need no place here: they hold tensors of different (global) names.

    Attributes:
        tp_rank: rank in the tensor-parallel group.
        tp_size: its size.
        dp_rank: rank among the replicas, that is in the data x context parallel group.
        dp_size: its size.
    """

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.tp_rank < self.tp_size and 0 <= self.dp_rank < self.dp_size):
            raise ValueError(f"no such place in a layout: {self}")


def shard_grid(groups: Groups) -> ShardGrid:
    """This rank's place."""
    return ShardGrid(
        tp_rank=groups.tp.rank(), tp_size=groups.tp.size(), dp_rank=groups.dp_cp.rank(), dp_size=groups.dp_cp.size()
    )


@dataclass(frozen=True, kw_only=True)
class ParameterBox:
    """The box of a whole tensor that a rank's parameter is.

    Attributes:
        global_shape: shape of the whole tensor.
        offset: first index of the box in every dimension.
        shape: the parameter's shape.
        first_of_tp: whether this rank stands for these values in its tensor-parallel group.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    first_of_tp: bool

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))


def box_of_shard(shape: Sequence[int], sharded_dim: int | None, grid: ShardGrid) -> ParameterBox:
    """Where a rank's parameter lies.

    Args:
        shape: of the rank's parameter.
        sharded_dim: dimension that tensor-parallel ranks divide into equal slices, in rank order; None where each
            holds the whole tensor.
        grid: the rank's place.

    Raises:
        ValueError: the parameter has no such dimension.
    """
    whole, offset = list(shape), [0] * len(shape)
    if sharded_dim is not None:
        if not 0 <= sharded_dim < len(shape):
            raise ValueError(f"dimension {sharded_dim} is sharded, but the parameter has the shape {tuple(shape)}")
        whole[sharded_dim] *= grid.tp_size
        offset[sharded_dim] = shape[sharded_dim] * grid.tp_rank
    return ParameterBox(
        global_shape=tuple(whole), offset=tuple(offset), shape=tuple(shape),
        first_of_tp=sharded_dim is not None or grid.tp_rank == 0,
    )
