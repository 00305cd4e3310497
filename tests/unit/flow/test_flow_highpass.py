from __future__ import annotations

import pytest
import torch

from flashi2v_kernels.registry import resolve
from megatron_flashi2v.flow.highpass import cutoff_ratios, high_frequency_features


def test_ratios_span_the_range():
    ratios = cutoff_ratios(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 0.05, 0.95)
    assert ratios.dtype == torch.float32
    torch.testing.assert_close(ratios, torch.tensor([0.05, 0.5, 0.95]))
    assert cutoff_ratios(torch.rand(4), 0.1, 0.1).tolist() == pytest.approx([0.1] * 4)
    for low, high in ((-0.1, 0.5), (0.5, 1.1), (0.6, 0.5)):
        with pytest.raises(ValueError, match="cutoff ratios"):
            cutoff_ratios(torch.rand(2), low, high)


def test_features_are_fp32_magnitudes_without_gradient():
    latents = torch.randn(2, 4, 6, 9, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    ratio_B = torch.tensor([0.2, 0.6])
    features = high_frequency_features(latents, ratio_B)
    assert features.dtype == torch.float32 and features.shape == latents.shape and not features.requires_grad
    assert (features > 0).all()
    reference = resolve("fourier_highpass", "cpu", torch.float64, "reference").function
    expected = reference(latents.detach().double(), ratio_B)
    # bf16's rounding of the result would be off by 1e-3
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-5)


def test_the_chosen_implementation_is_called():
    calls = []

    def highpass(images, ratios, *, return_abs):
        calls.append((images.dtype, return_abs))
        return images

    high_frequency_features(torch.rand(1, 2, 3, 4).bfloat16(), torch.rand(1), highpass)
    assert calls == [(torch.float32, True)]
