"""The Euler solver against fields whose Euler result is known in closed form."""

import torch

from megatron_flashi2v.flow.sigmas import inference_sigmas
from megatron_flashi2v.sampling.solvers import solve_euler

SHAPE_BCTHW = (2, 3, 2, 4, 5)


def noise(seed=0):
    return torch.randn(SHAPE_BCTHW, generator=torch.Generator().manual_seed(seed))


def test_straight_path_ends_at_the_data():
    """The flow's own field, ``noise - clean``, is constant along the path: any schedule ends at ``clean``."""
    start, clean = noise(1), noise(2)
    for num_steps, shift in ((1, 1.0), (4, 7.0), (50, 3.0)):
        end = solve_euler(lambda state, timestep: start - clean, start, inference_sigmas(num_steps, shift))
        torch.testing.assert_close(end, clean, atol=2e-6, rtol=0)


def test_linear_field_gives_the_product_of_step_factors():
    """For ``v = a y`` one step multiplies by ``1 + a (sigma' - sigma)``."""
    start, rate = noise(3), 0.7
    sigmas = inference_sigmas(6, 5.0)
    expected = start.double()
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        expected = expected * (1.0 + rate * (following - sigma))
    end = solve_euler(lambda state, timestep: rate * state, start, sigmas)
    torch.testing.assert_close(end.double(), expected, atol=1e-6, rtol=1e-6)


def test_velocity_sees_one_timestep_per_sample_at_the_start_of_each_step():
    sigmas = inference_sigmas(4, 7.0)
    seen = []

    def velocity(state, timestep_B):
        assert timestep_B.dtype == torch.float32 and timestep_B.shape == SHAPE_BCTHW[:1]
        assert timestep_B[0] == timestep_B[1]
        seen.append(timestep_B[0].item())
        return torch.zeros_like(state)

    solve_euler(velocity, noise(), sigmas)
    assert seen == (1000 * sigmas[:-1]).tolist()
    assert seen[0] == 1000.0


def test_state_stays_fp32_when_the_network_answers_in_bf16():
    """A bf16 state would lose steps smaller than its rounding."""
    start = torch.ones(SHAPE_BCTHW)
    end = solve_euler(
        lambda state, timestep: torch.ones_like(state, dtype=torch.bfloat16),
        start,
        inference_sigmas(1000, 1.0),
    )
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, torch.zeros(SHAPE_BCTHW), atol=1e-4, rtol=0)


def test_callback_hears_of_every_step_and_its_state():
    start, heard = noise(), []
    end = solve_euler(
        lambda state, timestep: torch.ones_like(state),
        start,
        inference_sigmas(3, 2.0),
        callback=lambda done, steps, state: heard.append((done, steps, state.clone())),
    )
    assert [(done, steps) for done, steps, _ in heard] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(heard[-1][2], end)
