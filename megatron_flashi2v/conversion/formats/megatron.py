"""The format ``megatron``: the checkpoints of ``flashi2v train``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.adapter_record import ADAPTER_NAME, read_adapter_record
from megatron_flashi2v.checkpoint.arrangements import Box
from megatron_flashi2v.checkpoint.folders import (
    MODEL_CONFIG_NAME,
    TRACKER_NAME,
    find_checkpoint,
    iteration_folder,
    load_model_config,
    load_state,
)
from megatron_flashi2v.checkpoint.index import Index, StoredPiece, StoredTensor, read_index, write_index
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.model_state import (
    EMA_PREFIX,
    MODEL_PREFIX,
    holds_weights,
    most_exact_key,
    require_ema,
)
from megatron_flashi2v.checkpoint.saving import finish_folder, write_tracker
from megatron_flashi2v.checkpoint.storage import TensorPiece, read_pieces, tensor_file_name
from megatron_flashi2v.checkpoint.tensor_file import FileRecord, TensorSpec
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.experts import range_record
from megatron_flashi2v.conversion.sources import box_shape, whole_box
from megatron_flashi2v.conversion.weights import (
    CARRIED_FACTS,
    OnBytes,
    ReadOptions,
    TensorGroup,
    Weights,
    plan_shards,
    require_tensors,
    write_shard,
)


class MegatronWeights(Weights):
    """The tensors of one ``iter_*`` folder; reads the model's fp32 master copies if it reads fp32."""

    def __init__(self, folder: Path, options: ReadOptions) -> None:
        self.source = folder
        self.config = load_model_config(folder)
        options.require_agreement(self.config, folder / MODEL_CONFIG_NAME)
        self.facts = load_state(folder)
        self._index = read_index(folder)
        self.options = options
        self._prefix = EMA_PREFIX if options.weights == "ema" else MODEL_PREFIX
        found = {
            key.removeprefix(self._prefix): tensor.shape
            for key, tensor in self._index.tensors.items()
            if key.startswith(self._prefix)
        }
        if options.weights == "ema":
            require_ema(folder, self._index)
        require_tensors(folder, parameter_shapes(self.config), found)
        self.names = {name: (self._prefix + name,) for name in found}
        self.left_out = tuple(key for key in self._index.tensors if not key.startswith(self._prefix))

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        return (self._index.tensors[self._prefix + name].dtype,)

    def own_dtype(self, name: str) -> torch.dtype:
        return self.stored_dtypes(name)[0]

    def read(self, name: str, box: Box | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self.dtype(name)
        key = self._prefix + name if self._prefix == EMA_PREFIX else most_exact_key(self._index, name, dtype)
        values = read_stored(self.source, self._index, key, box)
        return self.converted(key, f"{self.source}: tensor {key}", values, dtype)


def read_stored(folder: Path, index: Index, key: str, box: Box | None = None) -> torch.Tensor:
    """Read a tensor of a verified ``iter_*`` folder, or a box of it, in its stored dtype."""
    stored = index.tensors[key]
    box = whole_box(stored.shape) if box is None else box
    values = torch.empty(box_shape(box), dtype=stored.dtype)
    piece = TensorPiece(
        key=key, global_shape=stored.shape, offset=tuple(side.start for side in box), shape=box_shape(box), data=values
    )
    read_pieces(folder, [piece], index=index)
    return values


def open_weights(path: Path, options: ReadOptions) -> Weights:
    """Open the weights of a ``--save`` folder's newest whole checkpoint, or of an ``iter_*`` folder.

    Verifies the files that hold them first.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it lacks the EMA weights that the caller wants.
    """
    folder = find_checkpoint(path, peers=options.peers, needs=partial(holds_weights, options.weights))
    if folder is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a folder written by `flashi2v train --save`")
    adapter = read_adapter_record(folder)
    if adapter is not None:
        base = " ".join(adapter.base.split(":", 1))
        kind = "" if adapter.base_weights == "model" else f" --weights {adapter.base_weights}"
        raise CheckpointError(
            f"{folder} holds no whole model but what was trained beside frozen weights ({ADAPTER_NAME}); merge it into "
            f"them: flashi2v convert --from {base}{kind} --adapter {folder} --merge --to megatron OUT; to go on with "
            "its training, give it as --load beside the --load-weights of its start"
        )
    return MegatronWeights(folder, options)


def names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Key of each of our tensors in a checkpoint."""
    return {name: (MODEL_PREFIX + name,) for name in parameter_shapes(config)}


def write_weights(folder: Path, weights: Weights, max_bytes: int, on_bytes: OnBytes | None) -> None:
    """Write a ``--load`` folder: iteration 0, no samples consumed, no optimizer state, loadable at any layout."""
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
    carried = {name: weights.facts[name] for name in CARRIED_FACTS if name in weights.facts}
    state = {"iteration": 0, "consumed_samples": 0, **carried, **range_record(weights.facts)}
    finish_folder(checkpoint, weights.config, state)
    write_tracker(folder, 0)


def _read_one(weights: Weights, name: str) -> tuple[torch.Tensor]:
    return (weights.read(name),)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_weights` writes and nothing else, such as a run's checkpoints."""
    return {path.name for path in folder.iterdir()} == {iteration_folder(0), TRACKER_NAME}
