"""What can go wrong on a run's last rank alone, in the second iteration or in all; and what should come of it.

Most are observers that hang hooks on this rank's stages.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Container, Iterator
from typing import Any
from unittest import mock

import torch

from megatron_flashi2v.training.step import TrainingStep
from megatron_flashi2v.training.watching.observer import Observer

ITERATION = 2


def is_last_rank() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


class HookInIterations(Observer):
    """Hangs a hook on the last rank's stages for the forward and backward passes of some iterations.

    Args:
        hang: gets the stages; returns the handle by which the hook is removed.
        iterations: counted from 1.
    """

    def __init__(self, hang: Callable[[list[Any]], Any], iterations: Container[int]) -> None:
        self.hang, self.iterations, self.handle = hang, iterations, None

    def before_iteration(self, state: Any) -> None:
        if is_last_rank() and state.iteration + 1 in self.iterations:
            self.handle = self.hang(state.stages)

    def gradients_ready(self, state: Any, totals: Any) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


def spoiled_gradient(iterations: Container[int], value: float) -> Observer:
    """A value of one gradient on the last rank becomes another before it is reduced; the loss is sound."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    return HookInIterations(lambda stages: list(stages[-1].parameters())[-1].register_hook(spoil), iterations)


def infinite_gradient() -> Observer:
    """One value of one gradient on the last rank overflows."""
    return spoiled_gradient([ITERATION], math.inf)


def nan_output() -> Observer:
    """A NaN in what the last rank's head computes: its loss and gradients are NaN."""

    def spoil(head: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        spot = torch.zeros_like(output)
        spot.view(-1)[0] = math.nan
        return output + spot

    return HookInIterations(lambda stages: stages[-1].head.register_forward_hook(spoil), [ITERATION])


def slow_rank() -> Observer:
    """The last rank takes a while longer over every microbatch."""

    def wait(stage: Any, inputs: Any) -> None:
        time.sleep(2.0)  # an iteration takes less than that on a busy machine too

    return HookInIterations(lambda stages: stages[0].register_forward_pre_hook(wait), range(1, 1000))


def left_out() -> Any:
    """No fault, but the iteration's update is not applied: what a skipped update should come to."""
    apply, calls = TrainingStep.apply, []

    def sometimes(self: TrainingStep, grad_norm: float) -> None:
        calls.append(1)
        if len(calls) != ITERATION:
            apply(self, grad_norm)

    return mock.patch.object(TrainingStep, "apply", sometimes)


FAULTS: dict[str, Callable[[], Any]] = {
    function.__name__: function for function in (nan_output, infinite_gradient, left_out, slow_rank)
}


@contextlib.contextmanager
def planted(plants: dict[str, Callable[[], Any]], name: str | None) -> Iterator[list[Observer]]:
    """With one of the plants, or with none; the observers that do it. The others are contexts."""
    plant = None if name is None else plants[name]()
    if plant is None or isinstance(plant, Observer):
        yield [plant] if plant else []
    else:
        with plant:
            yield []


def planted_fault(name: str | None) -> contextlib.AbstractContextManager[list[Observer]]:
    """With one fault of :data:`FAULTS`, or with none."""
    return planted(FAULTS, name)
