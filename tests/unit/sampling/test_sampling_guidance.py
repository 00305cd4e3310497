"""Identities of classifier-free guidance, with a velocity that is a known function of its conditions."""

import pytest
import torch

from megatron_flashi2v.sampling.guidance import combine_guided, is_guided, with_guidance

BATCH, CHANNELS, FRAMES, HEIGHT, WIDTH, ROWS, DIM = 2, 3, 2, 4, 5, 6, 7


class Recorder:
    """``v = state + timestep/1000 + mean of text + image + cutoff ratio``, and the arguments of every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timestep, text, image, extras):
        self.calls.append((latents, timestep, text, image, extras["cutoff_ratio"]))
        per_sample = timestep / 1000 + text.mean(dim=(1, 2)) + extras["cutoff_ratio"]
        return latents + image + per_sample.view(-1, 1, 1, 1, 1)


@pytest.fixture
def arguments():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return (
        normal(BATCH, CHANNELS, FRAMES, HEIGHT, WIDTH),
        torch.tensor([300.0, 300.0]),
        normal(BATCH, ROWS, DIM),
        normal(BATCH, CHANNELS, 1, HEIGHT, WIDTH),
        {"cutoff_ratio": torch.tensor([0.1, 0.2])},
    )


@pytest.fixture
def negative():
    return torch.randn((BATCH, ROWS, DIM), generator=torch.Generator().manual_seed(1))


def test_scales_zero_and_one_are_the_unconditional_and_conditional_velocity():
    conditional, unconditional = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(combine_guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(combine_guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(
        combine_guided(conditional, unconditional, 5.0), 5.0 * conditional - 4.0 * unconditional
    )


@pytest.mark.parametrize(("scale", "active"), [(0.0, False), (1.0, False), (1.0001, True), (5.0, True)])
def test_only_a_scale_above_one_costs_a_second_pass(scale, active, arguments, negative):
    velocity = Recorder()
    guided = with_guidance(velocity, negative, scale)
    guided(*arguments)
    assert is_guided(scale) is active
    assert len(velocity.calls) == (2 if active else 1)


@pytest.mark.parametrize("batched", [False, True])
def test_result_is_the_extrapolation_from_the_negative_text(batched, arguments, negative):
    latents, timestep, text, image, extras = arguments
    velocity = Recorder()
    conditional = velocity(*arguments)
    unconditional = velocity(latents, timestep, negative, image, extras)
    guided = with_guidance(velocity, negative, 5.0, batched=batched)(*arguments)
    torch.testing.assert_close(guided, unconditional + 5.0 * (conditional - unconditional))


def test_both_passes_keep_every_condition_but_the_text(arguments, negative):
    velocity = Recorder()
    with_guidance(velocity, negative, 5.0)(*arguments)
    first, second = velocity.calls
    for position in (0, 1, 3, 4):
        assert torch.equal(first[position], second[position])
    assert torch.equal(first[2], arguments[2])
    assert torch.equal(second[2], negative)


def test_batched_guidance_is_one_call_with_the_samples_of_each_pass_together(arguments, negative):
    velocity = Recorder()
    with_guidance(velocity, negative, 5.0, batched=True)(*arguments)
    (call,) = velocity.calls
    for position in (0, 1, 3):
        assert torch.equal(call[position], torch.cat([arguments[position]] * 2))
    assert torch.equal(call[4], torch.cat([arguments[4]["cutoff_ratio"]] * 2))
    assert torch.equal(call[2], torch.cat([arguments[2], negative]))
