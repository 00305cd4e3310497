"""Reads the checkpoints that training of an adapter writes: pairs, and tensors that were trained whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.adapter_record import read_adapter_record
from megatron_flashi2v.checkpoint.adapter_table import FACTORS, adapter_mappings
from megatron_flashi2v.checkpoint.arrangements import Box, Shape
from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_model_config, load_state
from megatron_flashi2v.checkpoint.index import Index, read_index
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.model_state import (
    EMA_PREFIX,
    MODEL_PREFIX,
    holds_weights,
    most_exact_key,
    require_ema,
)
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.adapters.adapter import Adapter, Pair
from megatron_flashi2v.conversion.formats.megatron import read_stored
from megatron_flashi2v.conversion.sources import SourceTensor


@dataclass(frozen=True, kw_only=True)
class _Stored(SourceTensor):
    """A tensor of a checkpoint; a bf16 run's is read from its fp32 master copy.

    Attributes:
        index: of the folder, which is ``path``.
        stored: dtype of the trained tensor itself, or of its average.
    """

    index: Index
    stored: torch.dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.stored

    def read(self, box: Box | None = None) -> torch.Tensor:
        return read_stored(self.path, self.index, self.name, box)


def open_checkpoint(path: Path, weights: str = "model") -> Adapter:
    """Open the adapter in a ``--save`` folder's newest whole checkpoint, or in an ``iter_*`` folder.

    Args:
        path: the folder.
        weights: ``model``, or ``ema`` for the averaged ones.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it holds a full model.
    """
    folder = find_checkpoint(path, needs=partial(holds_weights, weights))
    if folder is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a folder written by `flashi2v train --save`")
    record = read_adapter_record(folder)
    if record is None:
        raise CheckpointError(f"{folder} is a checkpoint of a full model, and no adapter; give it by --from")
    config, index = load_model_config(folder), read_index(folder)
    if weights == "ema":
        require_ema(folder, index)

    def tensor(name: str, shape: Shape) -> _Stored:
        key = EMA_PREFIX + name if weights == "ema" else most_exact_key(index, name, torch.float32)
        held = index.tensors.get(key)
        if held is None or held.shape != shape:
            found = "is missing" if held is None else f"has shape {held.shape} instead of {shape}"
            raise CheckpointError(f"{folder} does not fit its adapter.json: tensor {key} {found}")
        trained = held if weights == "ema" else index.tensors.get(MODEL_PREFIX + name, held)
        return _Stored(path=folder, name=key, shape=shape, dtype=held.dtype, index=index, stored=trained.dtype)

    halves = {}
    for entry in adapter_mappings(config, record.adapter, "wan") if record.adapter else ():
        halves[entry.external[0]] = tensor(entry.ours, entry.shape)
    pairs = {}
    for layer in dict.fromkeys(name.rpartition(".lora_")[0] for name in halves):
        down, up = (halves[f"{layer}.{factor}.weight"] for factor in FACTORS)
        assert record.adapter is not None
        pairs[layer] = Pair(down=down, up=up, alpha=record.adapter.alpha)
    shapes = parameter_shapes(config)
    unknown = [name for name in record.trained if name not in shapes]
    if unknown:
        raise CheckpointError(f"{folder} does not fit its adapter.json: the model has no tensor {unknown[0]}")
    return Adapter(
        path=folder, form="megatron", pairs=pairs, whole={name: tensor(name, shapes[name]) for name in record.trained},
        config=config, base=record.base, base_weights=record.base_weights, base_fingerprint=record.base_fingerprint,
        facts=load_state(folder),
    )  # fmt: skip
