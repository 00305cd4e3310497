"""The definition of the high-pass: one image after the other, in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashi2v_kernels.fourier_highpass.cutoff import EPSILON, require_images


@torch.no_grad()
def fourier_highpass(
    images_BCHW: Tensor, ratio_B: Tensor, *, return_abs: bool = True, return_low: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Keep the frequencies at or beyond the cutoff radius of each image's spectrum.

    The radius is counted in bins from the zero frequency. Rings are added from the centre outward until they
    hold ``ratio`` of the spectrum's magnitude (its mean over channels); the ring that reaches it is the
    cutoff, and is kept. There is no gradient.

    Args:
        images_BCHW: images, e.g. one latent frame each; any float dtype.
        ratio_B: share of the magnitude to remove, in [0, 1], [B]; values outside are clamped.
        return_abs: return the magnitude ``sqrt(v^2 + 1e-12)`` of the filtered image, else the (signed) real
            part.
        return_low: also return the complement, the signed low-pass.

    Returns:
        the shape and dtype of ``images_BCHW``; a pair (high, low) with ``return_low``.

    Raises:
        ValueError: the shapes are not [B, C, H, W] and [B].
    """
    require_images(images_BCHW, ratio_B)
    height, width = images_BCHW.shape[-2:]
    high: list[Tensor] = []
    low: list[Tensor] = []
    for image_CHW, ratio in zip(images_BCHW.double(), ratio_B.tolist(), strict=True):
        spectrum_CHW = torch.fft.fftshift(torch.fft.fft2(image_CHW), dim=(-2, -1))
        magnitude_HW = (spectrum_CHW.abs().square() + EPSILON).sqrt().mean(dim=0)
        rings: dict[int, float] = {}
        for row in range(height):
            for column in range(width):
                squared_radius = (row - height // 2) ** 2 + (column - width // 2) ** 2
                rings[squared_radius] = rings.get(squared_radius, 0.0) + float(magnitude_HW[row, column])
        cutoff, held = max(rings), 0.0
        target = min(max(ratio, 0.0), 1.0) * math.fsum(rings.values())
        for squared_radius in sorted(rings):
            held += rings[squared_radius]
            if held >= target:
                cutoff = squared_radius
                break
        rows_H, columns_W = torch.arange(height) - height // 2, torch.arange(width) - width // 2
        mask_HW = (rows_H[:, None].square() + columns_W.square() >= cutoff).to(spectrum_CHW.device)
        for part, outputs in ((spectrum_CHW * mask_HW, high), (spectrum_CHW * ~mask_HW, low)):
            outputs.append(torch.fft.ifft2(torch.fft.ifftshift(part, dim=(-2, -1))))
    high_BCHW, low_BCHW = torch.stack(high), torch.stack(low).real.to(images_BCHW.dtype)
    filtered = (high_BCHW.abs().square() + EPSILON).sqrt() if return_abs else high_BCHW.real
    filtered = filtered.to(images_BCHW.dtype)
    return (filtered, low_BCHW) if return_low else filtered
