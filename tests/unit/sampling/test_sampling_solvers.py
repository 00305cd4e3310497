"""Schedulers of diffusers in our loop: its Euler is ours, and multistep ones are of second order."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.flow.sigmas import inference_sigmas
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.solvers import EulerSolver, SchedulerSolver, make_solver

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


MEAN, DEVIATION = 0.7, 0.4


def gaussian(state, timestep_B, *arguments):
    """The velocity ``E[noise - clean | state]`` of clean values that are normal with MEAN and DEVIATION."""
    sigma = timestep_B.view(-1, 1, 1, 1, 1) / 1000
    variance = sigma**2 + ((1 - sigma) * DEVIATION) ** 2
    slope = (sigma - (1 - sigma) * DEVIATION**2) / variance
    return slope * (state - (1 - sigma) * MEAN) - MEAN


def gaussian_state(sigma, normal):
    """The exact solution: along it, a state stays at the same quantile of its distribution."""
    return (1 - sigma) * MEAN + math.sqrt(sigma**2 + ((1 - sigma) * DEVIATION) ** 2) * normal


def between(kind):
    """A scheduler of the kind on an even grid from sigma .95 to .05: at 1 and 0 its variable, log SNR, is infinite."""

    class Between(kind):
        def set_timesteps(self, num_inference_steps, device):
            super().set_timesteps(num_inference_steps, device=device)
            self.sigmas = torch.linspace(0.95, 0.05, num_inference_steps + 1)
            self.timesteps = 1000 * self.sigmas[:-1]

    return Between(prediction_type="flow_prediction", use_flow_sigmas=True)


@pytest.mark.parametrize(("make", "order"), [
    (lambda steps: EulerSolver(torch.linspace(0.95, 0.05, steps + 1)), 1),
    (lambda steps: SchedulerSolver(between(UniPCMultistepScheduler), steps, CPU), 2),
    (lambda steps: SchedulerSolver(between(DPMSolverMultistepScheduler), steps, CPU), 2),
], ids=["euler", "unipc", "dpm++"])  # fmt: skip
def test_order_of_convergence(make, order):
    """The error falls with the number of steps to the power of the order; the last step of diffusers' is of first."""
    normal = torch.linspace(-2, 2, 5).view(5, 1, 1, 1, 1)
    coarse, fine = (
        denoise(gaussian, gaussian_state(0.95, normal), CONDITIONS, make(steps)) - gaussian_state(0.05, normal)
        for steps in (64, 256)
    )
    found = math.log(coarse.abs().max() / fine.abs().max(), 4)
    assert abs(found - order) < 0.25, found


@pytest.mark.parametrize("name", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_end_at_the_clean_value(name, steps):
    """Where all velocities point at one clean value, any number of steps ends there."""
    clean = 0.3
    solver = make_solver(name, steps, 7.0, CPU)
    start = torch.randn((1, 2, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    sigma = float(solver.timesteps_N[0]) / 1000

    def velocity(state, timestep_B, *arguments):
        return (state - clean) / (timestep_B[0] / 1000)

    end = denoise(velocity, clean + sigma * (start - clean), CONDITIONS, solver)
    # Whole timesteps stand for noise levels up to .001 away.
    assert (end - clean).abs().max() < (1e-6 if name == "euler" else 0.01)


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_steps_that_round_to_one_timestep_are_all_taken(kind):
    """With a shift of 30, the first steps of 100 have equal whole timesteps."""
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=30.0)
    solver = SchedulerSolver(scheduler, 100, CPU)
    assert solver.timesteps_N[0] == solver.timesteps_N[1]
    assert solve(solver)[0].isfinite().all() and scheduler.step_index == 100


def test_an_unknown_solver_is_named():
    with pytest.raises(ConfigError, match="solver is 'heun'; known are euler, unipc, dpm\\+\\+"):
        make_solver("heun", 3, 7.0, CPU)
