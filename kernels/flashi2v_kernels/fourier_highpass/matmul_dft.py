"""The high-pass without any complex dtype: a discrete Fourier transform by cosine and sine matrices.

Images are real and the mask is symmetric about the zero frequency, so that the filtered image is real: only
the real part of the inverse transform is computed. Latent frames are small (60x104 for 480x832 pixels), where
a matrix product costs about as much as an FFT.
"""

from __future__ import annotations

import math

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
    device, (height, width) = images_BCHW.device, images_BCHW.shape[-2:]
    with torch.autocast(device.type, enabled=False):  # the products must stay in fp32
        images = images_BCHW.float()
        rows, columns = _fourier_matrices(height, device), _fourier_matrices(width, device)
        real_BCHW, imaginary_BCHW = _transform(images, rows, columns)
        magnitude_BHW = (real_BCHW.square() + imaginary_BCHW.square() + EPSILON).sqrt().mean(dim=1)
        squared_radius_HW = squared_radius_map(height, width, device)
        cutoff_B = squared_cutoff(magnitude_BHW, squared_radius_HW, ratio_B)
        keep_B1HW = (squared_radius_HW >= cutoff_B[:, None, None])[:, None].float()
        high = _inverse_real(real_BCHW * keep_B1HW, imaginary_BCHW * keep_B1HW, rows, columns)
        filtered = ((high.square() + EPSILON).sqrt() if return_abs else high).to(images_BCHW.dtype)
        if not return_low:
            return filtered
        rest_B1HW = 1.0 - keep_B1HW
        low = _inverse_real(real_BCHW * rest_B1HW, imaginary_BCHW * rest_B1HW, rows, columns)
        return filtered, low.to(images_BCHW.dtype)


def _fourier_matrices(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``cos`` and ``sin`` of ``2 pi k n / size``, fp32 [size, size]: shifted frequencies k by positions n.

    The product k*n is reduced to half a turn as whole numbers; as fp32 angles of many turns it would lose
    digits.
    """
    positions = torch.arange(size, dtype=torch.int32, device=device)
    turns = (torch.outer(positions - size // 2, positions) + size // 2) % size - size // 2
    angles = turns.float() * (2.0 * math.pi / size)
    return angles.cos(), angles.sin()


def _transform(
    images: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the shifted spectrum: ``(C - iS)_H  x  (C - iS)_W^T``."""
    (row_cos, row_sin), (column_cos, column_sin) = rows, columns
    by_cos, by_sin = images @ column_cos.T, images @ column_sin.T
    return row_cos @ by_cos - row_sin @ by_sin, -(row_sin @ by_cos + row_cos @ by_sin)


def _inverse_real(
    real: Tensor, imaginary: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> Tensor:
    """Real part of ``(C + iS)_H^T  X  (C + iS)_W / (H W)``."""
    (row_cos, row_sin), (column_cos, column_sin) = rows, columns
    even = real @ column_cos - imaginary @ column_sin
    odd = real @ column_sin + imaginary @ column_cos
    return (row_cos.T @ even - row_sin.T @ odd) / (real.shape[-2] * real.shape[-1])
