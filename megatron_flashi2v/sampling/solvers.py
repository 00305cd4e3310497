"""Solvers of the flow's ordinary differential equation: a grid of noise levels, and the step from one to the next.

Shape suffixes: N steps, B samples, C latent channels, T latent frames, H and W latent rows and columns.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol, cast, get_args

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.sample import SolverName
from megatron_flashi2v.flow.interpolation import euler_step
from megatron_flashi2v.flow.sigmas import inference_sigmas, timesteps_of


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

    Its grid is its own, and its timesteps are whole numbers, as in diffusers' pipelines; but flow-matching schedulers
    such as Euler's shift the sigmas that they are given, which are evenly spaced from 1, as ours are.

    Args:
        scheduler: of diffusers' kind.
        num_steps: steps to ask of it.
        device: where it keeps its grid.

    Attributes:
        timesteps: the scheduler's own, by which it knows its steps; on the device, in its dtype.
    """

    def __init__(self, scheduler: Any, num_steps: int, device: torch.device) -> None:
        # Of the class: an object also answers for settings that it keeps for other schedulers.
        if hasattr(type(scheduler), "shift") and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float32)[:-1].tolist()
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            scheduler.set_timesteps(num_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            # Many steps round to equal timesteps; asked where these stand, a scheduler would leave out a step.
            scheduler.set_begin_index(0)
        self._scheduler = scheduler
        self.timesteps: torch.Tensor = scheduler.timesteps
        self.timesteps_N = self.timesteps.to("cpu", torch.float32)

    def step(self, index: int, velocity_BCTHW: torch.Tensor, state_BCTHW: torch.Tensor) -> torch.Tensor:
        """One step of the scheduler."""
        stepped = self._scheduler.step(velocity_BCTHW, self.timesteps[index], state_BCTHW, return_dict=False)
        return stepped[0]


def make_solver(name: SolverName, num_steps: int, shift: float, device: torch.device) -> Solver:
    """A solver by its name; each keeps its state, so that every video takes a new one.

    Args:
        name: ``euler`` is FlashI2V's; ``unipc`` and ``dpm++`` are diffusers' multistep schedulers of second order.
        num_steps: network evaluations (per guidance branch), at least 1.
        shift: of the noise levels toward noise, see :func:`~megatron_flashi2v.flow.sigmas.shift_sigmas`.
        device: of the state; a scheduler keeps its grid there.

    Raises:
        ConfigError: there is no solver of that name.
    """
    if name not in get_args(SolverName):
        raise ConfigError(f"solver is {name!r}; known are {', '.join(get_args(SolverName))}")
    if name == "euler":
        return EulerSolver(inference_sigmas(num_steps, shift))
    import diffusers

    kind = {"unipc": diffusers.UniPCMultistepScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}[name]
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return SchedulerSolver(scheduler, num_steps, device)


def exact_euler(scheduler: Any) -> Any:
    """diffusers' Euler scheduler in place of one that takes the same steps, but rounds timesteps to whole numbers.

    First-order DPM-Solver++ is such a one; a release carries it for diffusers' own pipelines. Others pass. Settings for
    other schedulers are kept, so that ``UniPCMultistepScheduler.from_config(scheduler.config)`` is on the right grid.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        return scheduler
    config: Any = cast("Any", scheduler).config
    if config.solver_order != 1 or config.algorithm_type != "dpmsolver++" or not config.use_flow_sigmas:
        return scheduler
    kept = {name: config[name] for name in ("prediction_type", "use_flow_sigmas", "flow_shift")}
    origin = {"_class_name": "DPMSolverMultistepScheduler"}  # or they would be called unexpected
    return FlowMatchEulerDiscreteScheduler.from_config({"shift": config.flow_shift, **kept, **origin})
