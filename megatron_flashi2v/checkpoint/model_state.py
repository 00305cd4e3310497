"""A rank's parameters as parts of global tensors: where they lie, and how a checkpoint fills them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_flashi2v.checkpoint.index import Index, read_index
from megatron_flashi2v.checkpoint.storage import TensorPiece, read_pieces
from megatron_flashi2v.config.errors import CheckpointError

if TYPE_CHECKING:  # importing megatron-core takes seconds, and converting a checkpoint does without
    from megatron_flashi2v.parallel.groups import Groups

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]

MODEL_PREFIX = "model."
EMA_PREFIX = "ema."
MASTER_PREFIX = "optimizer.master."


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
    """This rank's place in the grid."""
    return ShardGrid(
        tp_rank=groups.tp.rank(), tp_size=groups.tp.size(), dp_rank=groups.dp_cp.rank(), dp_size=groups.dp_cp.size()
    )


@dataclass(frozen=True, kw_only=True)
class ParameterBox:
    """The box of a global tensor that a rank's parameter is.

    Attributes:
        global_shape: shape of the whole tensor.
        offset: where the box begins.
        shape: the parameter's shape.
        first_of_tp: whether this rank is the one of its tensor-parallel group that stands for these values.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    first_of_tp: bool


def parameter_box(name: str, parameter: torch.Tensor, grid: ShardGrid) -> ParameterBox:
    """Where a parameter lies, from the attributes that megatron-core's parallel layers set on it.

    ``tensor_model_parallel`` with ``partition_dim`` k marks one of ``tp_size`` equal slices along k; any
    other parameter is the whole tensor on every rank of the tensor-parallel group.

    Raises:
        ValueError: the slices are interleaved (``partition_stride``), which no box can describe.
    """
    shape = tuple(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False):
        return ParameterBox(
            global_shape=shape, offset=(0,) * len(shape), shape=shape, first_of_tp=grid.tp_rank == 0
        )
    stride = getattr(parameter, "partition_stride", 1)
    if stride != 1:
        raise ValueError(f"{name}: partition_stride is {stride}, only 1 can be stored")
    axis = getattr(parameter, "partition_dim", -1)
    if not 0 <= axis < len(shape):
        raise ValueError(f"{name}: partition_dim is {axis}, the parameter has {len(shape)} dimensions")
    global_shape = tuple(size * (grid.tp_size if index == axis else 1) for index, size in enumerate(shape))
    offset = tuple(shape[axis] * grid.tp_rank if index == axis else 0 for index in range(len(shape)))
    return ParameterBox(global_shape=global_shape, offset=offset, shape=shape, first_of_tp=True)


def model_pieces(named_parameters: NamedParameters, grid: ShardGrid) -> list[TensorPiece]:
    """The pieces ``model.<name>`` of this rank's parameters; their data share the parameters' memory.

    Args:
        named_parameters: global names (global layer indices, no wrapper's prefix) and this rank's parameters.
        grid: this rank's place.
    """
    return [_model_piece(MODEL_PREFIX + name, name, parameter, grid) for name, parameter in named_parameters]


def _model_piece(key: str, name: str, parameter: torch.Tensor, grid: ShardGrid) -> TensorPiece:
    box = parameter_box(name, parameter, grid)
    return TensorPiece(
        key=key,
        global_shape=box.global_shape,
        offset=box.offset,
        shape=box.shape,
        data=parameter.detach(),
        owner=box.first_of_tp and grid.dp_rank == 0,
    )


def holds_weights(weights: str, key: str) -> bool:
    """Whether loading the weights ``model`` or ``ema`` reads the tensor ``key``."""
    return key.startswith((EMA_PREFIX,) if weights == "ema" else (MODEL_PREFIX, MASTER_PREFIX))


def require_ema(folder: Path, index: Index) -> None:
    """Refuse a checkpoint without averaged weights.

    Raises:
        CheckpointError: it holds none.
    """
    if not any(key.startswith(EMA_PREFIX) for key in index.tensors):
        raise CheckpointError(
            f"{folder} holds no EMA weights (tensors {EMA_PREFIX}*), since it was trained without --ema-decay; leave "
            "out --weights ema"
        )


def load_parameters(
    folder: Path, named_parameters: NamedParameters, grid: ShardGrid, *, weights: str = "model"
) -> None:
    """Fill this rank's parameters in place from a checkpoint of any layout.

    Converts values where the parameter and the stored tensor differ in precision. An fp32 parameter takes the stored
    fp32 master copy of a bf16 tensor, if there is one. Afterwards update the fp32 copies of an existing mixed-precision
    optimizer, by :func:`~megatron_flashi2v.checkpoint.optimizer_state.load_optimizer` or mcore's
    ``reload_model_params``.

    Args:
        folder: a checkpoint.
        named_parameters: global names and this rank's parameters.
        grid: this rank's place.
        weights: ``model``, or ``ema`` for the averaged ones.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file is damaged.
    """
    index = read_index(folder)
    averaged = weights == "ema"
    if averaged:
        require_ema(folder, index)
    pieces = [
        _model_piece(
            EMA_PREFIX + name if averaged else most_exact_key(index, name, parameter.dtype), name, parameter, grid
        )
        for name, parameter in named_parameters
    ]
    read_pieces(folder, pieces, allow_cast=True, index=index)


def most_exact_key(index: Index, name: str, dtype: torch.dtype) -> str:
    """Key of the stored tensor to read parameter ``name`` in ``dtype`` from: the model's, or its master copy."""
    stored, master = index.tensors.get(MODEL_PREFIX + name), index.tensors.get(MASTER_PREFIX + name)
    if stored and master and dtype == master.dtype != stored.dtype:
        return MASTER_PREFIX + name
    return MODEL_PREFIX + name
