from __future__ import annotations

import math

import pytest
import torch

from megatron_flashi2v.flow.sinusoid import timestep_sinusoid


@pytest.mark.parametrize("dim", [2, 6, 256])
def test_cosines_then_sines(dim):
    timesteps = torch.tensor([0.0, 1.5, 999.9])
    features, half = timestep_sinusoid(timesteps, dim, dtype=torch.float64), dim // 2
    assert features.shape == (3, dim)
    for row, timestep in zip(features.tolist(), timesteps.tolist(), strict=True):
        angles = [timestep * 10000 ** (-i / half) for i in range(half)]
        assert row[:half] == pytest.approx([math.cos(angle) for angle in angles], abs=1e-12)
        assert row[half:] == pytest.approx([math.sin(angle) for angle in angles], abs=1e-12)


def test_result_is_the_rounding_of_fp64():
    timesteps = (torch.rand(50) * 1000).requires_grad_()
    features = timestep_sinusoid(timesteps, 256)
    assert features.dtype == torch.float32 and features.is_cpu and not features.requires_grad
    assert torch.equal(features, timestep_sinusoid(timesteps, 256, dtype=torch.float64).float())
    assert timestep_sinusoid(timesteps, 256, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_odd_widths_are_refused():
    for dim in (0, 3):
        with pytest.raises(ValueError, match=f"dim is {dim}"):
            timestep_sinusoid(torch.rand(2), dim)
