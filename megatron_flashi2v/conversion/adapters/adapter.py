"""The neutral form of an adapter: pairs of matrices by the original name of the linear layer that they change.

A pair adds (alpha / r) B A to a layer's weight W [out, in], with A [r, in] and B [out, r] (arXiv 2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.arrangements import FusedHeads
from megatron_flashi2v.checkpoint.key_table import BACKBONE
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.sources import SourceTensor

_BLOCK = re.compile(r"blocks([._])(\d+)\1")
_WEIGHT = "weight"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two matrices of one layer.

    Attributes:
        down: A [r, in]; a convolution's may have more dimensions, with r first.
        up: B [out, r], likewise.
        alpha: the pair counts alpha / r.
    """

    down: SourceTensor
    up: SourceTensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def tensors(self) -> tuple[SourceTensor, SourceTensor]:
        """A and B."""
        return self.down, self.up

    def product(self, rows: slice = slice(None)) -> torch.Tensor:
        """These rows of (alpha / r) B A, fp32 [rows, in]."""
        up, down = self.up.read().float().flatten(1)[rows], self.down.read().float().flatten(1)
        return (up @ down).mul_(self.alpha / self.rank)


Pairs = Mapping[str, Pair]
"""By the layer's original name, such as ``blocks.0.self_attn.q``."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as it was found; the last fields are of our checkpoints alone.

    Attributes:
        path: file or folder, for messages.
        form: its name on the command line.
        pairs: of the model, or of the expert for high noise.
        low_noise: of the expert for low noise.
        whole: tensors that were trained whole beside the pairs, by our name.
        config: of the model that was trained; its paradigm may be another one than the base's.
        base: where training found its base, as FORMAT:PATH.
        base_weights: which of the base's weights: ``model`` or ``ema``; empty if it is not recorded.
        base_fingerprint: of that base; empty if it is not recorded.
        facts: what the checkpoint states about the training, JSON-ready.
    """

    path: Path
    form: str
    pairs: Pairs
    low_noise: Pairs = field(default_factory=dict)
    whole: Mapping[str, SourceTensor] = field(default_factory=dict)
    config: ModelConfig | None = None
    base: str = ""
    base_weights: str = ""
    base_fingerprint: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line for the log."""
        every = [*self.pairs.values(), *self.low_noise.values()]
        ranks = sorted({pair.rank for pair in every})
        if not ranks:
            return f"{len(self.whole)} whole tensors"
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"{len(every)} pairs of rank {shown}"


def require_finite(adapter: Adapter) -> None:
    """Read every matrix, before work begins.

    Raises:
        CheckpointError: one cannot be read, or holds a value that is NaN or infinite.
    """
    every = (*adapter.pairs.values(), *adapter.low_noise.values())
    for tensor in (tensor for pair in every for tensor in pair.tensors):
        if not bool(tensor.read().isfinite().all()):
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} holds values that are NaN or infinite; use another copy"
            )


@cache
def _linears() -> dict[str, str]:
    """Every linear layer's name in diffusers by its original one, with {i} for the block; from the key table."""
    names = {}
    for module in BACKBONE:
        weight = module.tensors.get(_WEIGHT)
        if weight is None or len(weight.shape) != 2:
            continue
        for part in weight.transform.parts if isinstance(weight.transform, FusedHeads) else ("",):
            names[module.wan.replace("{part}", part)] = module.diffusers.replace("{part}", part)
    return names


@cache
def _originals() -> dict[str, str]:
    """Original names by every spelling: their own, diffusers', and both with underscores for dots."""
    names = {spelt: wan for wan, theirs in _linears().items() for spelt in (theirs, wan)}
    return {name.replace(".", "_"): wan for name, wan in names.items()} | names


def original_name(name: str) -> str | None:
    """The original name of a linear layer that is given in original, diffusers' or kohya's spelling; None if unknown.

    ``blocks.3.attn1.to_q`` and ``blocks_3_self_attn_q`` are both ``blocks.3.self_attn.q``.
    """
    block = _BLOCK.match(name)
    template = name if block is None else f"blocks{block[1]}{{i}}{block[1]}{name[block.end() :]}"
    original = _originals().get(template)
    return original if original is None or block is None else original.replace("{i}", block[2])


def diffusers_name(original: str) -> str:
    """A linear layer's name in diffusers.

    Raises:
        KeyError: the table has no such layer.
    """
    block = _BLOCK.match(original)
    if block is None:
        return _linears()[original]
    return _linears()[f"blocks.{{i}}.{original[block.end() :]}"].replace("{i}", block[2])
