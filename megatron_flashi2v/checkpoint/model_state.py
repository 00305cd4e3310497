"""A rank's parameters as parts of global tensors, and how a checkpoint fills them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.index import Index, read_index
from megatron_flashi2v.checkpoint.storage import TensorPiece, read_pieces
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.models.weight_shards import WeightShard, whole_weights
from megatron_flashi2v.parallel.placement import ShardGrid

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]

MODEL_PREFIX = "model."
EMA_PREFIX = "ema."
MASTER_PREFIX = "optimizer.master."


def model_pieces(named_parameters: NamedParameters, grid: ShardGrid) -> list[TensorPiece]:
    """The pieces ``model.<name>`` of this rank's parameters; their data share the parameters' memory.

    Args:
        named_parameters: global names (global layer indices, no wrapper's prefix) and this rank's parameters.
        grid: this rank's place.
    """
    return weight_pieces(whole_weights(named_parameters, grid))


def weight_pieces(shards: Iterable[WeightShard]) -> list[TensorPiece]:
    """The pieces ``model.<name>`` of a rank's weights; their data share the weights' memory."""
    return [_piece(MODEL_PREFIX + shard.name, shard) for shard in shards]


def _piece(key: str, shard: WeightShard) -> TensorPiece:
    box = shard.box
    return TensorPiece(
        key=key, global_shape=box.global_shape, offset=box.offset, shape=box.shape, flat_range=shard.flat_range,
        data=shard.data, owner=shard.owner,
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


def load_weights(folder: Path, shards: Iterable[WeightShard], *, weights: str = "model") -> None:
    """Fill this rank's weights in place from a checkpoint of any layout.

    Converts values where the parameter and the stored tensor differ in precision. An fp32 parameter takes the stored
    fp32 master copy of a bf16 tensor, if there is one. Afterwards update the fp32 copies of an existing mixed-precision
    optimizer, by :func:`~megatron_flashi2v.checkpoint.optimizer_state.load_optimizer` or mcore's
    ``reload_model_params``.

    Args:
        folder: a checkpoint.
        shards: this rank's.
        weights: ``model``, or ``ema`` for the averaged ones.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file is damaged.
    """
    index = read_index(folder)
    averaged = weights == "ema"
    if averaged:
        require_ema(folder, index)
    pieces = [
        _piece(
            EMA_PREFIX + shard.name if averaged else most_exact_key(index, shard.name, shard.data.dtype), shard
        )
        for shard in shards
    ]
    read_pieces(folder, pieces, allow_cast=True, index=index)


def most_exact_key(index: Index, name: str, dtype: torch.dtype) -> str:
    """Key of the stored tensor to read parameter ``name`` in ``dtype`` from: the model's, or its master copy."""
    stored, master = index.tensors.get(MODEL_PREFIX + name), index.tensors.get(MASTER_PREFIX + name)
    if stored and master and dtype == master.dtype != stored.dtype:
        return MASTER_PREFIX + name
    return MODEL_PREFIX + name
