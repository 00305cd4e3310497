"""What is computed again in backward, to keep less in memory. Every choice gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor, Tensor])


@dataclass(frozen=True)
class Recompute:
    """What a stage's blocks compute again in backward.

    Attributes:
        layers: whole blocks that keep only their input, counted from the stage's first.
        group: such blocks that share one kept input.
        inside: what every block does: ``skip_attention`` keeps its input and what self-attention takes and gives;
            ``selective`` drops the outputs of norms, modulation and GELU.
    """

    layers: int = 0
    group: int = 1
    inside: Literal["skip_attention", "selective"] | None = None


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, of which only the inputs are kept; there is no randomness to restore."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def dropping_output(function: Callable[..., Tensor], consumer: Callable[[Tensor], Result], *inputs: Any) -> Result:
    """``consumer(function(*inputs))`` without keeping what is between.

    ``function`` must be cheap, and its output what ``consumer`` saves for its own backward: that storage is emptied
    after the forward pass and filled again once a gradient has arrived at the consumer's output (the last, of
    several).
    """
    if not torch.is_grad_enabled():
        return consumer(function(*inputs))
    dropped = CheckpointWithoutOutput(fp8=None)  # megatron-core takes any other value, False too, for fp8
    result = consumer(dropped.checkpoint(function, *inputs))
    dropped.discard_output_and_register_recompute(result if isinstance(result, Tensor) else result[-1])
    return result


def keeping_output(function: Callable[..., Tensor], consumer: Callable[[Tensor], Result], *inputs: Any) -> Result:
    """``consumer(function(*inputs))``, as autograd keeps it."""
    return consumer(function(*inputs))
