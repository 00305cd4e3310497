"""A base model's fingerprint, by which an adapter finds it again, in whatever format it is stored."""

from __future__ import annotations

import hashlib
import math

import torch

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
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
