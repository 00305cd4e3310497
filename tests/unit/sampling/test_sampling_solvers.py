"""Schedulers of diffusers in our loop: its Euler is ours, and multistep ones come nearer to the exact solution."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from megatron_flashi2v.flow.sigmas import inference_sigmas
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.solvers import EulerSolver, SchedulerSolver

CONDITIONS = Conditions(text_BLD=torch.empty(0), image_latents_BC1HW=torch.empty(0), extras={})
RATE, SHIFT, CPU = 0.9, 3.0, torch.device("cpu")


def decay(state, *arguments):
    """``dy / dsigma = a y``, so that y falls by ``exp(-a)`` from sigma 1 to 0."""
    return RATE * state


def solve(solver):
    start = torch.randn((2, 3, 2, 4, 5), generator=torch.Generator().manual_seed(0))
    return denoise(decay, start, CONDITIONS, solver), math.exp(-RATE) * start


def test_diffusers_euler_is_ours():
    solver, ours = SchedulerSolver(FlowMatchEulerDiscreteScheduler(shift=SHIFT), 6, CPU), inference_sigmas(6, SHIFT)
    assert solver.timesteps_N.dtype == torch.float32
    torch.testing.assert_close(solver.timesteps_N, 1000 * ours[:-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(solve(solver)[0], solve(EulerSolver(ours))[0], rtol=1e-6, atol=1e-6)


def test_a_solver_of_the_same_scheduler_starts_anew():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    first, second = (solve(SchedulerSolver(scheduler, 4, CPU))[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_multistep_solvers_come_nearer_than_euler(kind):
    """On their own grids, with their memory of earlier steps."""
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    found, exact = solve(SchedulerSolver(scheduler, 20, CPU))
    euler, _ = solve(EulerSolver(inference_sigmas(20, SHIFT)))
    error, euler_error = ((end - exact).abs().max() for end in (found, euler))
    assert error < euler_error / 4
