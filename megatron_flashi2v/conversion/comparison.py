"""Comparison of two sets of weights, tensor by tensor and bit by bit."""

from __future__ import annotations

import hashlib

import torch

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.weights import OnBytes, Weights


def require_equal_weights(source: Weights, written: Weights, on_bytes: OnBytes | None = None) -> dict[str, str]:
    """Read both and compare each tensor's dtype, shape, bytes and SHA-256, one tensor in memory at a time.

    Compares bytes, not only values: two NaNs are equal, and zero differs from minus zero.

    Args:
        source: the weights to write, in the dtype to write.
        written: the written weights.
        on_bytes: called with the number of bytes after each tensor.

    Returns:
        SHA-256 of every tensor's bytes, by our name.

    Raises:
        CheckpointError: the models differ; or names the first tensor that differs.
    """
    if source.config.to_json() != written.config.to_json():
        raise CheckpointError(f"{written.source} is of another model than {source.source}")
    digests = {}
    for name in parameter_shapes(source.config):
        expected, found = source.read(name), written.read(name)
        if expected.dtype != found.dtype or expected.shape != found.shape:
            raise CheckpointError(
                f"{written.source}: tensor {name} is {found.dtype} {tuple(found.shape)}, {source.source} gives "
                f"{expected.dtype} {tuple(expected.shape)}"
            )
        digests[name] = digest(expected)
        if not torch.equal(as_bytes(expected), as_bytes(found)) or digest(found) != digests[name]:
            different = int((as_bytes(expected) != as_bytes(found)).sum())
            raise CheckpointError(
                f"{written.source}: tensor {name} differs from {source.source} in {different} of its {expected.nbytes} "
                "bytes"
            )
        if on_bytes is not None:
            on_bytes(expected.nbytes)
    return digests


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8 and flat."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(as_bytes(tensor).numpy().data).hexdigest()
