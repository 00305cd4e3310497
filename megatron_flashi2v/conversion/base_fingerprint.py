"""A base model's fingerprint, by which an adapter finds it again, in whatever format it is stored."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.initial_weights import InitialWeights, open_initial_weights
from megatron_flashi2v.conversion.weights import Weights
from megatron_flashi2v.runtime.random import keyed_seed

SAMPLED_VALUES = 65_536
"""Values that are read of each tensor; smaller ones are read whole. Of a 14B model 0.3 GB in all."""


def base_fingerprint(weights: Weights) -> str:
    """Hash names and shapes of all tensors and a stretch of rows of each, whose place the tensor's name decides.

    The values are taken as fp32, so that one model has one fingerprint in every format and dtype that holds the same
    values; a copy rounded to another precision is another model. A change of a few values of a large tensor can escape,
    any training of the tensor does not.

    Args:
        weights: opened; every rank finds the same.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(parameter_shapes(weights.config).items()):
        digest.update(f"{name} {list(shape)}\n".encode())
        rows = min(max(SAMPLED_VALUES // math.prod(shape[1:]), 1), shape[0])
        first = keyed_seed(0, "base-fingerprint", name) % (shape[0] - rows + 1)
        box = (slice(first, first + rows), *(slice(0, size) for size in shape[1:]))
        digest.update(weights.read(name, box, torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_base(
    folder: Path, record: AdapterRecord, model: ModelConfig, source: tuple[str, Path] | None = None
) -> InitialWeights:
    """Open the weights beside which a checkpoint was trained.

    Args:
        folder: the checkpoint, for messages.
        record: of what it holds.
        model: of the checkpoint.
        source: format and path of the base; by default where it was in training.

    Raises:
        UserError: the base is missing or damaged, or other weights are found.
    """
    if source is None:
        name, _, path = record.base.partition(":")
        source = name, Path(path)
    name, place = source
    if not place.exists():
        raise CheckpointError(
            f"{folder} was trained beside {record.base}, and {place} does not exist; give these weights as --base "
            "FORMAT:PATH"
        )
    base = open_initial_weights(source, model, record.base_weights)
    found = base_fingerprint(base.weights)
    if found != record.base_fingerprint:
        raise CheckpointError(
            f"{folder} was trained beside other weights than {name}:{place}: their fingerprint is "
            f"{record.base_fingerprint[:16]}..., this one's {found[:16]}...; give those of {record.base}"
        )
    return base
