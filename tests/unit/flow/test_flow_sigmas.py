from __future__ import annotations

import math

import pytest
import torch

from megatron_flashi2v.flow.sigmas import (
    NUM_TRAIN_TIMESTEPS,
    dynamic_shift,
    inference_sigmas,
    logit_normal_sigmas,
    shift_sigmas,
    sigmas_between,
    timesteps_of,
    uniform_sigmas,
)


def test_logit_normal():
    draws = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.bfloat16)
    sigmas = logit_normal_sigmas(draws, mean=0.5, std=2.0)
    assert sigmas.dtype == torch.float32
    expected = [1 / (1 + math.exp(-(0.5 + 2.0 * draw))) for draw in (-1.0, 0.0, 2.0)]
    torch.testing.assert_close(sigmas, torch.tensor(expected))


def test_uniform():
    draws = torch.tensor([0.0, 0.25], dtype=torch.float64)
    assert uniform_sigmas(draws).dtype == torch.float32
    assert uniform_sigmas(draws).tolist() == [0.0, 0.25]


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.0), (0.0, 0.9), (0.3, 0.35), (0.0, 1.0)])
@pytest.mark.parametrize("logit", [None, (0.0, 1.0), (0.5, 0.7)])
def test_part_of_a_distribution_is_what_rejection_leaves(low, high, logit):
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(2_000_000, generator=generator) if logit is None else logit_normal_sigmas(
        torch.randn(2_000_000, generator=generator), *logit
    )
    plain = shift_sigmas(plain, 3.0)
    left = plain[(plain >= low) & (plain <= high)].sort().values
    ranks = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    found = sigmas_between(ranks, low, high, logit=logit, shift=3.0)
    assert found.dtype == torch.float32
    assert torch.allclose(found, left[(ranks * len(left)).long()], atol=0.03 * (high - low))


def test_part_of_a_distribution_stays_in_its_range():
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    for low, high in ((0.9, 1.0), (0.0, 0.875), (0.999, 1.0)):
        found = sigmas_between(ends, low, high, logit=(0.0, 1.0), shift=5.0)
        assert low <= found[0] < found[1] <= high and found.isfinite().all()
    # Nine standard deviations above the middle there still is a distribution: most of it at its lower end.
    far = sigmas_between(torch.tensor([0.0, 0.5, 0.99]), 0.9, 1.0, logit=(0.0, 0.25), shift=1.0)
    assert 0.9 <= far[0] < far[1] < far[2] < 0.92


def test_dynamic_shift_is_a_line_in_the_tokens_of_a_frame():
    assert math.isclose(dynamic_shift(32, 32), math.exp(0.5))
    assert math.isclose(dynamic_shift(128, 128), math.exp(1.15))
    middle = dynamic_shift(68, 128)  # 2176 tokens, half-way between 256 and 4096
    assert math.isclose(middle, math.exp((0.5 + 1.15) / 2))
    assert dynamic_shift(256, 128) > math.exp(1.15) and dynamic_shift(2, 2) < math.exp(0.5)  # not clamped
    assert dynamic_shift(17, 23) == dynamic_shift(1, 388)  # 391 pixels: 97 whole tokens


@pytest.mark.parametrize("shift", [0.5, 1.0, 7.0])
def test_shift(shift):
    sigmas = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigmas(sigmas, shift)
    assert shifted.dtype == torch.float32
    assert shifted[0] == 0.0 and shifted[-1] == 1.0
    assert (shifted.diff() > 0).all()
    # the odds of noise against signal are multiplied by the shift
    odds = (sigmas / (1 - sigmas))[1:-1] * shift
    torch.testing.assert_close(shifted[1:-1].double(), odds / (1 + odds))


@pytest.mark.parametrize(("steps", "shift"), [(1, 7.0), (4, 7.0), (50, 1.0), (50, 7.0)])
def test_inference_sigmas_fall_from_one_to_zero(steps, shift):
    sigmas = inference_sigmas(steps, shift)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
    assert (sigmas.diff() < 0).all()
    if shift == 1.0:
        torch.testing.assert_close(sigmas.diff(), torch.full((steps,), -1 / steps))


def test_timesteps_are_not_rounded():
    sigmas = torch.tensor([0.0, 0.1234567, 1.0])
    assert torch.equal(timesteps_of(sigmas), sigmas * NUM_TRAIN_TIMESTEPS)
    assert timesteps_of(sigmas)[2] == 1000.0


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        inference_sigmas(0, 7.0)
    for shift in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="shift is"):
            shift_sigmas(torch.rand(3), shift)
