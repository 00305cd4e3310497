"""Initial noise depends on (seed, index) alone."""

import torch

from megatron_flashi2v.sampling.noise import sample_noise

SHAPE_CTHW = (4, 3, 8, 10)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    together = sample_noise(5, [0, 1, 2], SHAPE_CTHW)
    alone = torch.cat([sample_noise(5, [index], SHAPE_CTHW) for index in (2, 0, 1)])
    assert torch.equal(together, alone[[1, 2, 0]])


def test_noise_does_not_touch_the_default_generator():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    sample_noise(0, [0], SHAPE_CTHW)
    assert torch.equal(torch.rand(1), expected)


def test_samples_and_seeds_have_different_noise():
    noise = torch.cat([sample_noise(0, [0, 1], SHAPE_CTHW), sample_noise(1, [0], SHAPE_CTHW)])
    correlation = torch.corrcoef(noise.flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.15


def test_noise_is_standard_normal_fp32_on_the_host():
    noise = sample_noise(0, range(8), SHAPE_CTHW)
    assert noise.dtype == torch.float32 and noise.device.type == "cpu" and noise.shape == (8, *SHAPE_CTHW)
    assert abs(noise.mean().item()) < 0.03 and abs(noise.std().item() - 1) < 0.03
