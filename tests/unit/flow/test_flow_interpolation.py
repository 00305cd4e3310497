from __future__ import annotations

import pytest
import torch

from megatron_flashi2v.flow.interpolation import euler_step, interpolate, velocity_target


def draw(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 3, 4, 5, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolation_per_sample(dtype):
    latents, noise, sigma_B = draw(dtype), draw(dtype, seed=1), torch.tensor([0.0, 0.3, 1.0])
    mixed = interpolate(latents, noise, sigma_B)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[0], latents[0].float()) and torch.equal(mixed[2], noise[2].float())
    torch.testing.assert_close(mixed[1], 0.3 * noise[1].float() + 0.7 * latents[1].float())


def test_velocity_is_the_derivative_of_the_path():
    latents, noise = draw().double(), draw(seed=1).double()
    low, high = (interpolate(latents, noise, torch.full((3,), sigma)) for sigma in (0.25, 0.75))
    target = velocity_target(latents, noise)
    assert target.dtype == torch.float32
    torch.testing.assert_close((high - low) / 0.5, target, rtol=1e-5, atol=1e-5)


def test_target_of_bf16_tensors_is_not_rounded():
    latents, noise = draw(torch.bfloat16), draw(torch.bfloat16, seed=1)
    target = velocity_target(latents, noise)
    assert target.dtype == torch.float32
    assert torch.equal(target.double(), noise.double() - latents.double())


def test_steps_along_the_true_velocity_reach_the_data():
    latents, noise = draw(), draw(seed=1)
    state, sigmas = noise, torch.tensor([1.0, 0.8, 0.3, 0.0])
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        state = euler_step(state, velocity_target(latents, noise), sigma, next_sigma)
    torch.testing.assert_close(state, latents, rtol=1e-5, atol=1e-5)


def test_step_computes_in_fp32_and_keeps_the_dtype():
    state, velocity = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([-10.0], dtype=torch.bfloat16)
    step = euler_step(state, velocity, 0.3, 0.1)
    assert step.dtype == torch.bfloat16 and step.item() == 258.0
    many, directions = draw(torch.bfloat16), draw(torch.bfloat16, seed=1)
    expected = (many.double() - 0.07 * directions.double()).bfloat16()
    assert torch.equal(euler_step(many, directions, 0.1, 0.03), expected)
    exact = euler_step(state.float(), velocity, 0.3, 0.1)
    assert exact.dtype == torch.float32 and exact.item() == pytest.approx(258.0)
    assert torch.equal(exact, euler_step(state.float(), velocity, torch.tensor(0.3), torch.tensor(0.1)))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="latents and noise differ"):
        interpolate(draw(), draw()[:, :, :1], torch.rand(3))
    with pytest.raises(ValueError, match="sigma has shape"):
        interpolate(draw(), draw(), torch.rand(1))
    with pytest.raises(ValueError, match="latents and noise differ"):
        velocity_target(draw(), draw()[:1])
    with pytest.raises(ValueError, match="state and velocity differ"):
        euler_step(draw(), draw()[:1], 1.0, 0.5)
