"""The high-pass by ``torch.fft``, all images at once, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from flashi2v_kernels.fourier_highpass.cutoff import (
    EPSILON,
    require_images,
    squared_cutoff,
    squared_radius_map,
)


@torch.no_grad()
def fourier_highpass(
    images_BCHW: Tensor, ratio_B: Tensor, *, return_abs: bool = True, return_low: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`flashi2v_kernels.fourier_highpass.reference.fourier_highpass`."""
    require_images(images_BCHW, ratio_B)
    dtype, (height, width) = images_BCHW.dtype, images_BCHW.shape[-2:]
    spectrum_BCHW = torch.fft.fftshift(torch.fft.fft2(images_BCHW.float()), dim=(-2, -1))
    magnitude_BHW = _magnitude(spectrum_BCHW).mean(dim=1)
    squared_radius_HW = squared_radius_map(height, width, images_BCHW.device)
    cutoff_B = squared_cutoff(magnitude_BHW, squared_radius_HW, ratio_B)
    keep_B1HW = (squared_radius_HW >= cutoff_B[:, None, None])[:, None]
    high_BCHW = _inverse(spectrum_BCHW * keep_B1HW)
    filtered = (_magnitude(high_BCHW) if return_abs else high_BCHW.real).to(dtype)
    if return_low:
        return filtered, _inverse(spectrum_BCHW * ~keep_B1HW).real.to(dtype)
    return filtered


def _magnitude(values: Tensor) -> Tensor:
    return (values.real.square() + values.imag.square() + EPSILON).sqrt()


def _inverse(shifted_spectrum: Tensor) -> Tensor:
    return torch.fft.ifft2(torch.fft.ifftshift(shifted_spectrum, dim=(-2, -1)))
