"""The denoising loop with fields whose Euler result is known in closed form, and what callers can do in it."""

import torch

from megatron_flashi2v.flow.sigmas import inference_sigmas
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.solvers import EulerSolver

SHAPE_BCTHW = (2, 3, 2, 4, 5)
CONDITIONS = Conditions(text_BLD=torch.ones(2, 4, 6), image_latents_BC1HW=torch.ones(2, 3, 1, 4, 5), extras={})


def noise(seed=0):
    return torch.randn(SHAPE_BCTHW, generator=torch.Generator().manual_seed(seed))


def solve(field, start, sigmas, **options):
    """Euler steps along ``field(state, timestep_B)``."""
    return denoise(
        lambda state, timestep_B, *conditions: field(state, timestep_B), start, CONDITIONS, EulerSolver(sigmas),
        **options,
    )


def test_straight_path_ends_at_the_data():
    """The flow's own field, ``noise - clean``, is constant along the path: any schedule ends at ``clean``."""
    start, clean = noise(1), noise(2)
    for num_steps, shift in ((1, 1.0), (4, 7.0), (50, 3.0)):
        end = solve(lambda state, timestep_B: start - clean, start, inference_sigmas(num_steps, shift))
        torch.testing.assert_close(end, clean, atol=2e-6, rtol=0)


def test_linear_field_gives_the_product_of_step_factors():
    """For ``v = a y`` one step multiplies by ``1 + a (sigma' - sigma)``."""
    start, rate = noise(3), 0.7
    sigmas = inference_sigmas(6, 5.0)
    expected = start.double()
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        expected = expected * (1.0 + rate * (following - sigma))
    end = solve(lambda state, timestep_B: rate * state, start, sigmas)
    torch.testing.assert_close(end.double(), expected, atol=1e-6, rtol=1e-6)


def test_velocity_sees_one_timestep_per_sample_at_the_start_of_each_step():
    sigmas = inference_sigmas(4, 7.0)
    seen = []

    def field(state, timestep_B):
        assert timestep_B.dtype == torch.float32 and timestep_B.shape == SHAPE_BCTHW[:1]
        assert timestep_B[0] == timestep_B[1]
        seen.append(timestep_B[0].item())
        return torch.zeros_like(state)

    solve(field, noise(), sigmas)
    assert seen == (1000 * sigmas[:-1]).tolist()
    assert seen[0] == 1000.0


def test_state_stays_fp32_when_the_network_answers_in_bf16():
    """A bf16 state would lose steps smaller than its rounding."""
    start = torch.ones(SHAPE_BCTHW)
    end = solve(
        lambda state, timestep_B: torch.ones_like(state, dtype=torch.bfloat16), start, inference_sigmas(1000, 1.0)
    )
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, torch.zeros(SHAPE_BCTHW), atol=1e-4, rtol=0)


def test_the_conditions_reach_every_call_of_the_guided_velocity():
    calls = []

    def velocity(*arguments):
        calls.append(arguments)
        return torch.ones_like(arguments[0])

    def guidance(plain):
        return lambda *arguments: 3 * plain(*arguments)

    start, extras = noise(), {"cutoff_ratio": torch.tensor([0.1, 0.2])}
    conditions = Conditions(
        text_BLD=CONDITIONS.text_BLD, image_latents_BC1HW=CONDITIONS.image_latents_BC1HW, extras=extras
    )
    end = denoise(velocity, start, conditions, EulerSolver(inference_sigmas(3, 7.0)), guidance=guidance)
    torch.testing.assert_close(end, start - 3)
    assert len(calls) == 3
    for _, _, text, image, given in calls:
        assert text is conditions.text_BLD and image is conditions.image_latents_BC1HW and given is extras


def test_callback_sees_every_step_and_its_state():
    start, seen = noise(), []
    end = solve(
        lambda state, timestep_B: torch.ones_like(state), start, inference_sigmas(3, 2.0),
        callback=lambda done, steps, state: seen.append((done, steps, state.clone())),
    )
    assert [(done, steps) for done, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(seen[-1][2], end)


def test_a_returned_tensor_replaces_the_state():
    replaced = solve(
        lambda state, timestep_B: torch.ones_like(state), noise(), inference_sigmas(2, 1.0),
        callback=lambda done, steps, state: torch.zeros_like(state) if done == 1 else None,
    )
    torch.testing.assert_close(replaced, torch.full(SHAPE_BCTHW, -0.5))


def test_the_loop_can_be_left():
    start, done = noise(), []
    end = solve(
        lambda state, timestep_B: torch.ones_like(state), start, inference_sigmas(4, 1.0),
        callback=lambda step, steps, state: done.append(step), stop=lambda: len(done) == 3,
    )
    torch.testing.assert_close(end, start - 0.75)
    assert done == [1, 2, 3]
