"""FlashI2V's Fourier guidance: the high-frequency part of the condition image's latents.

Source: ``flashi2v/utils/filter.py`` on FlashI2V's main branch; the npu branch computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashi2v_kernels.registry import resolve


def cutoff_ratios(uniform_draws_B: Tensor, low: float, high: float) -> Tensor:
    """Per-sample cutoff ratios ``low + (high - low) * U``, clamped to [0, 1].

    Args:
        uniform_draws_B: draws from [0, 1), [B].
        low: smallest ratio (0.05 in the published training).
        high: largest ratio (0.95); equal to ``low`` for a constant, as at inference (0.1).

    Returns:
        fp32 [B].

    Raises:
        ValueError: not ``0 <= low <= high <= 1``.
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"cutoff ratios {low} to {high} are not in order within [0, 1]")
    return (low + (high - low) * uniform_draws_B.float()).clamp(0.0, 1.0)


@torch.no_grad()
def high_frequency_features(
    image_latents_BCHW: Tensor, ratio_B: Tensor, highpass: Callable[..., Tensor] | None = None
) -> Tensor:
    """Magnitude of the image latents beyond a cutoff that removes ``ratio`` of the spectrum.

    The cutoff radius is found per sample: bins are taken by ascending distance from the zero frequency until
    they hold ``ratio`` of the sample's spectral magnitude (averaged over channels); the ring reached is kept.

    Args:
        image_latents_BCHW: normalised latents of the condition image, any float dtype.
        ratio_B: cutoff ratio of each sample in [0, 1], [B].
        highpass: the implementation chosen at build time (``resolve("fourier_highpass", ...).function``);
            None picks the best one for the tensor's device.

    Returns:
        fp32 [B, C, H, W], non-negative, without gradient.
    """
    if highpass is None:
        highpass = resolve("fourier_highpass", image_latents_BCHW.device.type, torch.float32).function
    return highpass(image_latents_BCHW.float(), ratio_B, return_abs=True)
