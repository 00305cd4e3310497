"""Measures each frame against the condition image: peak signal-to-noise ratio and structural similarity, over time.

Shapes: T frames, H and W rows and columns, C = 3 colours.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megatron_flashi2v.evaluation.quality import psnr_per_frame

PSNR_CEILING = 100.0
"""dB that equal frames count as, so that means stay finite."""
WINDOW = 11
"""Pixels of the window of the structural similarity, and the least side of a picture."""
WINDOW_SIGMA = 1.5
STABILISERS = (0.01**2, 0.03**2)
"""For values in [0, 1]."""
BATCH = 8
"""Frames at a time, which bounds the memory."""


def psnr_to_image(frames_THWC: torch.Tensor, image_HWC: torch.Tensor) -> NDArray[np.float64]:
    """dB of each frame against the image: fp64 ``[T]``, at most :data:`PSNR_CEILING`."""
    frames = frames_THWC.cpu().numpy()
    image = np.broadcast_to(image_HWC.cpu().numpy(), frames.shape)
    return np.minimum(psnr_per_frame(image, frames), PSNR_CEILING)


def ssim_to_image(frames_THWC: torch.Tensor, image_HWC: torch.Tensor) -> NDArray[np.float64]:
    """Structural similarity of each frame to the image.

    Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004: a Gaussian window
    of 11 pixels and sigma 1.5, wherever it fits into the picture, and the mean over colours.

    Args:
        frames_THWC: uint8 RGB of at least 11 x 11 pixels.
        image_HWC: uint8 RGB of the same size.

    Returns:
        fp64 ``[T]``, 1 for equal frames.
    """
    parts = [_ssim(_scaled(part), _scaled(image_HWC[None])) for part in frames_THWC.split(BATCH)]
    return torch.cat(parts).double().cpu().numpy()


def _ssim(frames_TCHW: torch.Tensor, image_1CHW: torch.Tensor) -> torch.Tensor:
    """[T]."""
    luminance, contrast = STABILISERS
    image_1CHW = image_1CHW.expand_as(frames_TCHW)
    mean, wanted_mean = _windowed(frames_TCHW), _windowed(image_1CHW)
    variance = _windowed(frames_TCHW**2) - mean**2
    wanted_variance = _windowed(image_1CHW**2) - wanted_mean**2
    covariance = _windowed(frames_TCHW * image_1CHW) - mean * wanted_mean
    # The means were taken about grey, which keeps the differences of squares exact in fp32.
    mean, wanted_mean = mean + 0.5, wanted_mean + 0.5
    alike = (2 * mean * wanted_mean + luminance) * (2 * covariance + contrast)
    whole = (mean**2 + wanted_mean**2 + luminance) * (variance + wanted_variance + contrast)
    return (alike / whole).mean(dim=(1, 2, 3))


def _scaled(frames_THWC: torch.Tensor) -> torch.Tensor:
    """fp32 [T, C, H, W] in [-0.5, 0.5]."""
    return frames_THWC.permute(0, 3, 1, 2).float() / 255 - 0.5


def _windowed(value_TCHW: torch.Tensor) -> torch.Tensor:
    """The Gaussian mean of each window that fits."""
    places = torch.arange(WINDOW, dtype=value_TCHW.dtype, device=value_TCHW.device) - WINDOW // 2
    kernel = torch.exp(-(places**2) / (2 * WINDOW_SIGMA**2))
    kernel = kernel / kernel.sum()
    channels = value_TCHW.shape[1]
    rows = F.conv2d(value_TCHW, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
