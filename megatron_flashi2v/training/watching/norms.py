"""Norms of gradients and parameters by part of the model, the same on all ranks and at every layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.optimizer_state import optimizer_shards
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.training.watching.observer import Observer, Row

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

BLOCK_GROUPS = 8
"""At most so many groups of neighbouring blocks."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """L2 norms by part; the squares of the gradient's add up to the square of the global norm.

    Attributes:
        gradients: before clipping.
        parameters: before the update, of the fp32 master copies; frozen ones do not count, nor have a gradient.
    """

    gradients: dict[str, float]
    parameters: dict[str, float]


def part_of(name: str, num_layers: int) -> str:
    """The part that a parameter, by its global name, belongs to.

    The embeddings, ``head``, the paradigm's modules by their own names (``phi``, ``fourier_embedding``), and groups of
    neighbouring blocks such as ``blocks_00_03``.
    """
    first, *rest = name.split(".")
    if first == "blocks":
        size = math.ceil(num_layers / BLOCK_GROUPS)
        start = int(rest[0]) // size * size
        return f"blocks_{start:02d}_{min(start + size, num_layers) - 1:02d}"
    return rest[0] if first == "conditioning" else first


class NormsByPart(Observer):
    """Adds ``grad_norm_by_part`` and ``param_norm_by_part`` to rows (see :class:`Norms`).

    Args:
        model: resolved dimensions.
        interval: iterations between rows with norms.
        device: where the default group's backend wants tensors.
    """

    def __init__(self, model: ModelConfig, interval: int, device: torch.device) -> None:
        self._interval, self._device = interval, device
        self._layers = model.num_layers
        # All of the model's, so that ranks with other stages add up the same vector.
        self.parts = tuple(dict.fromkeys(part_of(name, self._layers) for name in parameter_shapes(model)))
        self._found: Norms | None = None

    def gradients_ready(self, state: TrainState, totals: Mapping[str, Sequence[int]]) -> None:
        """Measure where a row with norms is due."""
        due = (state.iteration + 1) % self._interval == 0
        self._found = self.measure(state.optimizer, state.named_parameters(), state.grid) if due else None

    def after_iteration(self, row: Row) -> None:
        """Add what was measured."""
        if self._found is not None:
            row["grad_norm_by_part"] = self._found.gradients
            row["param_norm_by_part"] = self._found.parameters

    @torch.no_grad()
    def measure(
        self, optimizer: MegatronOptimizer, parameters: Sequence[tuple[str, nn.Parameter]], grid: ShardGrid
    ) -> Norms:
        """The norms of the gradients that the optimizer is about to apply, and of the parameters; all ranks call it.

        Args:
            optimizer: of this rank.
            parameters: global names and parameters of all of this rank's stages.
            grid: this rank's place.
        """
        shards = [shard for shard in optimizer_shards(optimizer, parameters, grid) if shard.owner]
        parts = [self.parts.index(part_of(shard.name, self._layers)) for shard in shards]
        squares_2P = torch.stack([
            self._squares([shard.gradient for shard in shards], parts),
            self._squares([shard.weights for shard in shards], parts),
        ])
        torch.distributed.all_reduce(squares_2P)
        of_gradients, of_parameters = squares_2P.sqrt().tolist()
        return Norms(
            gradients=dict(zip(self.parts, of_gradients, strict=True)),
            parameters=dict(zip(self.parts, of_parameters, strict=True)),
        )

    def _squares(self, tensors: Sequence[Tensor | None], parts: Sequence[int]) -> Tensor:
        """Sums of squares [parts] of this rank's tensors, fp32."""
        held = [(tensor, part) for tensor, part in zip(tensors, parts, strict=True) if tensor is not None]
        total_P = torch.zeros(len(self.parts), device=self._device)
        if not held:
            return total_P
        squares = torch.stack(torch._foreach_norm([tensor for tensor, _ in held])).float().square()
        of_part = torch.tensor([part for _, part in held], device=self._device)
        for part in range(len(self.parts)):
            # Chosen rather than multiplied: what is not finite stays in its part.
            total_P[part] = torch.where(of_part == part, squares, 0.0).sum()
        return total_P
