"""What can go wrong on a run's last rank alone, in the second iteration or in all; and what should come of it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from megatron_flashi2v.training import step
from megatron_flashi2v.training.step import TrainingStep

ITERATION = 2


def is_last_rank() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def nan_latents() -> Any:
    """A NaN in the latents that the last rank computes with: its loss and all its gradients are NaN."""
    accumulate, forward = TrainingStep.losses_and_gradients, step.forward_step
    calls: list[int] = []

    def counted(self: TrainingStep, *arguments: Any) -> Any:
        calls.append(1)
        return accumulate(self, *arguments)

    def spoiled(spec: Any, batches: Any, model: Any) -> Any:
        if len(calls) == ITERATION and is_last_rank():
            batch = next(batches)
            latents = batch.latents_BCTHW.clone()
            latents[0, 0, 0, 0, 0] = math.nan
            batches = iter([dataclasses.replace(batch, latents_BCTHW=latents)])
        return forward(spec, batches, model)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(TrainingStep, "losses_and_gradients", counted))
    stack.enter_context(mock.patch.object(step, "forward_step", spoiled))
    return stack


def infinite_gradient() -> Any:
    """One value of one gradient on the last rank overflows before it is reduced; the loss is sound."""
    accumulate, calls = TrainingStep.losses_and_gradients, []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = math.inf
        return gradient

    def counted(self: TrainingStep, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) != ITERATION or not is_last_rank():
            return accumulate(self, *arguments)
        hook = list(self.stages[-1].parameters())[-1].register_hook(overflow)
        try:
            return accumulate(self, *arguments)
        finally:
            hook.remove()

    return mock.patch.object(TrainingStep, "losses_and_gradients", counted)


def left_out() -> Any:
    """No fault, but the iteration's update is not applied: what a skipped update should come to."""
    apply, calls = TrainingStep.apply, []

    def sometimes(self: TrainingStep, grad_norm: float) -> None:
        calls.append(1)
        if len(calls) != ITERATION:
            apply(self, grad_norm)

    return mock.patch.object(TrainingStep, "apply", sometimes)


def slow_rank() -> Any:
    """The last rank takes a while longer over every microbatch."""
    forward = step.forward_step

    def slow(*arguments: Any) -> Any:
        if is_last_rank():
            time.sleep(1.0)
        return forward(*arguments)

    return mock.patch.object(step, "forward_step", slow)


FAULTS: dict[str, Callable[[], Any]] = {
    function.__name__: function for function in (nan_latents, infinite_gradient, left_out, slow_rank)
}


def faulty(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """With one fault of :data:`FAULTS`, or with none."""
    return contextlib.nullcontext() if name is None else FAULTS[name]()
