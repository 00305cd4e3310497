"""The format ``megatron``: what ``flashi2v train`` saves and loads."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.checkpoint import (
    TRACKER_NAME,
    find_checkpoint,
    finish_folder,
    iteration_folder,
    load_model_config,
    write_tracker,
)
from megatron_flashi2v.checkpoint.index import Index, StoredPiece, StoredTensor, read_index, write_index
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.state import MODEL_PREFIX, most_exact_key
from megatron_flashi2v.checkpoint.storage import read_full, tensor_file_name
from megatron_flashi2v.checkpoint.tensor_file import FileRecord, TensorSpec
from megatron_flashi2v.checkpoint.weights import (
    OnBytes,
    TensorGroup,
    Weights,
    cast,
    plan_shards,
    require_tensors,
    write_shard,
)
from megatron_flashi2v.config.errors import CheckpointError


class MegatronWeights(Weights):
    """The model's tensors of one ``iter_*`` folder; fp32 master copies where fp32 is asked for."""

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.config = load_model_config(folder)
        self._folder = folder
        self._index = read_index(folder)
        self._wanted = dtype
        found = {
            key.removeprefix(MODEL_PREFIX): tensor.shape
            for key, tensor in self._index.tensors.items()
            if key.startswith(MODEL_PREFIX)
        }
        require_tensors(folder, parameter_shapes(self.config), found)

    def dtype(self, name: str) -> torch.dtype:
        return self._wanted or self._index.tensors[MODEL_PREFIX + name].dtype

    def read(self, name: str) -> torch.Tensor:
        dtype = self.dtype(name)
        key = most_exact_key(self._index, name, dtype)
        return cast(name, read_full(self._folder, key, index=self._index), dtype)


def open_weights(path: Path, dtype: torch.dtype | None) -> Weights:
    """The weights of a ``--save`` folder's latest checkpoint, or of an ``iter_*`` folder.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a folder written by `flashi2v train --save`")
    return MegatronWeights(folder, dtype)


def write_weights(folder: Path, weights: Weights, max_bytes: int, on_bytes: OnBytes | None) -> None:
    """Write a ``--load`` folder: iteration 0, no samples consumed, no optimizer, loadable at any layout."""
    checkpoint = folder / iteration_folder(0)
    checkpoint.mkdir()
    groups = [
        TensorGroup(
            specs=(TensorSpec(name=MODEL_PREFIX + name, dtype=weights.dtype(name), shape=shape),),
            load=partial(_read_one, weights, name),
        )
        for name, shape in parameter_shapes(weights.config).items()
    ]
    shards = plan_shards(groups, max_bytes)
    files: dict[str, FileRecord] = {}
    tensors: dict[str, StoredTensor] = {}
    for number, shard in enumerate(shards):
        name = tensor_file_name(number, len(shards))
        files[name] = write_shard(checkpoint / name, shard, on_bytes)
        for spec in (spec for group in shard for spec in group.specs):
            piece = StoredPiece(
                file=name, name=spec.name, offset=(0,) * len(spec.shape), shape=spec.shape, flat_range=None
            )
            tensors[spec.name] = StoredTensor(dtype=spec.dtype, shape=spec.shape, pieces=(piece,))
    write_index(checkpoint, Index(tensors=tensors, files=files))
    finish_folder(checkpoint, weights.config, {"iteration": 0, "consumed_samples": 0})
    write_tracker(folder, 0)


def _read_one(weights: Weights, name: str) -> tuple[torch.Tensor]:
    return (weights.read(name),)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_weights` wrote and nothing else, such as a run's
    checkpoints."""
    return {path.name for path in folder.iterdir()} == {iteration_folder(0), TRACKER_NAME}
