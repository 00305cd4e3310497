"""A base model's fingerprint, by which an adapter finds it again, in whatever format it is stored."""

from __future__ import annotations

import hashlib
import math

import torch

from megatron_flashi2v.checkpoint.arrangements import Shape
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.conversion.weights import Weights
from megatron_flashi2v.runtime.random import keyed_seed

SAMPLED_VALUES, SAMPLED_ROWS = 65_536, 24
"""Values that are read of each tensor, and its fewest rows; smaller tensors are read whole. Of a 14B model 0.2 GB."""


def base_fingerprint(weights: Weights, values: int = SAMPLED_VALUES, rows: int = SAMPLED_ROWS) -> str:
    """Hash names and shapes of all tensors and some rows of each, whose places the tensor's name decides.

    The values are taken as fp32, so that one model has one fingerprint in every format and dtype that holds the same
    values; a copy rounded to another precision is another model. The rows are spread over the tensor, so that training
    of any projection that it fuses, in all blocks, does not escape; a change of a few rows of a large tensor can.

    Args:
        weights: opened; every rank finds the same.
        values: to read of each tensor.
        rows: to read of each tensor at least.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(parameter_shapes(weights.config).items()):
        digest.update(f"{name} {list(shape)}\n".encode())
        for stretch in sampled_rows(name, shape, values, rows):
            box = (stretch, *(slice(0, size) for size in shape[1:]))
            digest.update(weights.read(name, box, torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def sampled_rows(name: str, shape: Shape, values: int = SAMPLED_VALUES, rows: int = SAMPLED_ROWS) -> list[slice]:
    """Stretches of rows of a tensor, one at a random place in each of as many equal parts of it."""
    rows = max(values // math.prod(shape[1:]), rows)
    if rows >= shape[0]:
        return [slice(0, shape[0])]
    parts = min(rows, SAMPLED_ROWS)
    length, found = rows // parts, []
    for part in range(parts):
        start, end = part * shape[0] // parts, (part + 1) * shape[0] // parts
        first = start + keyed_seed(0, "base-fingerprint", name, part) % (end - start - length + 1)
        found.append(slice(first, first + length))
    return found


def common_fingerprint(weights: Weights, peers: Peers) -> str:
    """The fingerprint of a base that ranks opened together: rank 0's, whose values all ranks see a few of.

    Collective. Ranks whose nodes hold other copies differ in these values.

    Raises:
        CheckpointError: the same on all ranks: a rank cannot read the base, or reads another one than rank 0.
    """
    doing, few, whole = f"comparing {weights.source} over ranks", "", ""
    error: Exception | None = None
    try:
        few = base_fingerprint(weights, values=1, rows=1) if peers.world_size > 1 else ""
        whole = base_fingerprint(weights) if peers.rank == 0 else ""
    except (UserError, OSError) as caught:
        error = caught
    peers.agree(error, doing)
    first, whole = peers.share([few, whole])
    if few != first:
        error = CheckpointError(f"{weights.source} holds other weights here than on rank 0; copy the same to all nodes")
    peers.agree(error, doing)
    return str(whole)
