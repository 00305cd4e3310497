"""The exponential moving average of the weights, kept where the optimizer keeps them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_flashi2v.checkpoint.index import read_index
from megatron_flashi2v.checkpoint.model_state import EMA_PREFIX, NamedParameters
from megatron_flashi2v.checkpoint.optimizer_state import optimizer_shards
from megatron_flashi2v.checkpoint.storage import TensorPiece, read_pieces
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.train import OptimizerArguments
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.runtime.logging import AGREED

logger = logging.getLogger(__name__)


def decay_of_update(number: int, decay: float, warmup: str) -> float:
    """Share of the average that an update keeps.

    Args:
        number: of the update, counted from 1.
        decay: the limit.
        warmup: ``reference``: min(decay, (1 + n) / (10 + n)), FlashI2V's npu branch; ``none``: always ``decay``, its
            main branch.
    """
    return min(decay, (1 + number) / (10 + number)) if warmup == "reference" else decay


class WeightAverage:
    """fp32 averages of the weights that this rank's optimizer updates: with the distributed optimizer, of its share.

    ema <- decay * ema + (1 - decay) * weights, after every optimizer step; it starts as the weights.

    Args:
        arguments: limit of the decay, which must be set, and warm-up.
        optimizer: whose fp32 weights are averaged.
        named_parameters: global names and this rank's parameters.
        grid: this rank's place.
    """

    def __init__(
        self,
        arguments: OptimizerArguments,
        optimizer: MegatronOptimizer,
        named_parameters: NamedParameters,
        grid: ShardGrid,
    ) -> None:
        assert arguments.ema_decay is not None
        self._decay, self._warmup = arguments.ema_decay, arguments.ema_warmup
        self._shards = list(optimizer_shards(optimizer, named_parameters, grid))
        self._averages = [shard.weights.detach().to(torch.float32, copy=True) for shard in self._shards]
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move toward the present weights."""
        self._updates += 1
        if self._averages:  # a stage may have nothing to train
            share = 1.0 - decay_of_update(self._updates, self._decay, self._warmup)
            torch._foreach_lerp_(self._averages, [shard.weights.detach() for shard in self._shards], share)

    def pieces(self) -> list[TensorPiece]:
        """``ema.<name>`` of this rank, sharing the averages' memory."""
        return [
            shard.piece(EMA_PREFIX + shard.name, average)
            for shard, average in zip(self._shards, self._averages, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state that is the same on all ranks."""
        return {"updates": self._updates, "decay": self._decay, "warmup": self._warmup}

    @torch.no_grad()
    def resume(self, folder: Path, state: dict[str, Any] | None) -> None:
        """Load the averages of a checkpoint of any layout; without any, start from the weights, loaded before.

        Args:
            folder: the checkpoint.
            state: what :meth:`state_dict` was when it was saved.

        Raises:
            CheckpointError: it is damaged.
        """
        if state is None:
            logger.warning("%s holds no moving average of the weights: it starts from the weights", folder,
                           extra=AGREED)
            for shard, average in zip(self._shards, self._averages, strict=True):
                average.copy_(shard.weights)
            return
        updates = state.get("updates")
        if not isinstance(updates, int):
            raise CheckpointError(f"{folder}: the number of EMA updates is {updates!r}; the checkpoint is damaged")
        read_pieces(folder, self.pieces(), index=read_index(folder))
        self._updates = updates
