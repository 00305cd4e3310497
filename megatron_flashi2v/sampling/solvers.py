"""Solvers of the flow's ordinary differential equation: a grid of noise levels, and the step from one to the next.

Shape suffixes: N steps, B samples, C latent channels, T latent frames, H and W latent rows and columns.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch

from megatron_flashi2v.flow.interpolation import euler_step
from megatron_flashi2v.flow.sigmas import timesteps_of


class Solver(Protocol):
    """One way to solve; an instance solves once, from its first noise level to its last.

    Attributes:
        timesteps_N: 1000 * sigma of every step, fp32 on the host.
    """

    timesteps_N: torch.Tensor

    def step(self, index: int, velocity_BCTHW: torch.Tensor, state_BCTHW: torch.Tensor) -> torch.Tensor:
        """The state at the next noise level, in fp32.

        Args:
            index: of the step; steps are taken in order, each once.
            velocity_BCTHW: estimate of ``noise - clean`` at the state, fp32.
            state_BCTHW: fp32.
        """


class EulerSolver:
    """``y <- y + v(y, 1000 sigma[i]) * (sigma[i+1] - sigma[i])``, one velocity per step.

    Args:
        sigmas: fp32 ``[N + 1]`` on the host, the schedule from 1 (noise) to 0 (clean).
    """

    def __init__(self, sigmas: torch.Tensor) -> None:
        self._sigmas = sigmas
        self.timesteps_N = timesteps_of(sigmas[:-1])

    def step(self, index: int, velocity_BCTHW: torch.Tensor, state_BCTHW: torch.Tensor) -> torch.Tensor:
        """One Euler step."""
        return euler_step(state_BCTHW, velocity_BCTHW, self._sigmas[index], self._sigmas[index + 1])


class SchedulerSolver:
    """A scheduler of diffusers that predicts flow, with its own memory of earlier steps.

    Its grid is its own, but for flow-matching schedulers such as Euler's: these shift the sigmas that they are given,
    which are evenly spaced from 1, as ours are.

    Args:
        scheduler: of diffusers' kind.
        num_steps: steps to ask of it.
        device: where it keeps its grid.

    Attributes:
        timesteps: the scheduler's own, by which it knows its steps; on the device, in its dtype.
    """

    def __init__(self, scheduler: Any, num_steps: int, device: torch.device) -> None:
        if hasattr(scheduler, "shift") and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float32)[:-1].tolist()
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            scheduler.set_timesteps(num_steps, device=device)
        self._scheduler = scheduler
        self.timesteps: torch.Tensor = scheduler.timesteps
        self.timesteps_N = self.timesteps.to("cpu", torch.float32)

    def step(self, index: int, velocity_BCTHW: torch.Tensor, state_BCTHW: torch.Tensor) -> torch.Tensor:
        """One step of the scheduler."""
        stepped = self._scheduler.step(velocity_BCTHW, self.timesteps[index], state_BCTHW, return_dict=False)
        return stepped[0]
