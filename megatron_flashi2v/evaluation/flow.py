"""Optical flow between the frames of a video: Lucas and Kanade's least squares in an image pyramid, dense.

B. Lucas, T. Kanade, "An Iterative Image Registration Technique with an Application to Stereo Vision", IJCAI 1981;
J.-Y. Bouguet, "Pyramidal Implementation of the Lucas Kanade Feature Tracker", 2000. All pairs of frames are one batch.

Shapes: N pairs, H and W rows and columns; a flow is [N, 2, H, W], columns first, in pixels a frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_SIDE = 128
"""Pixels; larger frames are reduced to this before their flow is computed."""
SMALLEST_LEVEL = 12
"""Pixels of the shorter side, under which the pyramid has no further level."""
ITERATIONS = 4
WINDOW_SIGMA = 3.0
"""Pixels: width of the Gaussian window over which a motion is taken to be uniform."""
RIDGE = 5e-4
"""Added to the squared gradients, in (grey levels from 0 to 1)^2: flat areas, with noise alone, are taken to rest."""
EXPLAINED = 0.5
"""Share of the squared difference around a pixel that its flow must explain to count as motion."""
PREFILTER_SIGMA = 1.0
"""Pixels: blur of the frames, without which gradients are mostly noise."""


def flow_magnitudes(frames_THWC: Tensor) -> Tensor:
    """Measure how far the picture moves from each frame to the next.

    A pixel around which the flow does not explain how the frames differ counts as resting: noise and flicker differ
    without moving.

    Args:
        frames_THWC: uint8 RGB, at least two frames.

    Returns:
        fp32 ``[T - 1]``: mean length of the flow, as a share of the picture's longer side.
    """
    grey_T1HW = _blurred(reduced(grey(frames_THWC)), PREFILTER_SIGMA)
    before_N1HW, after_N1HW = grey_T1HW[:-1], _exposed_like(grey_T1HW[1:], grey_T1HW[:-1])
    flow_N2HW = optical_flow(before_N1HW, after_N1HW)
    difference = _blurred((after_N1HW - before_N1HW) ** 2, WINDOW_SIGMA)
    unexplained = _blurred((_warped(after_N1HW, flow_N2HW) - before_N1HW) ** 2, WINDOW_SIGMA)
    moves_N1HW = unexplained < (1 - EXPLAINED) * difference
    return (flow_N2HW.norm(dim=1) * moves_N1HW[:, 0]).mean(dim=(1, 2)) / max(grey_T1HW.shape[2:])


def optical_flow(before_N1HW: Tensor, after_N1HW: Tensor) -> Tensor:
    """The flow with which ``after(position + flow)`` looks like ``before(position)``.

    Args:
        before_N1HW: fp32 grey levels in [0, 1].
        after_N1HW: likewise, of the same shape.

    Returns:
        fp32 ``[N, 2, H, W]`` in pixels.
    """
    levels = [(before_N1HW, after_N1HW)]
    while min(levels[-1][0].shape[2:]) >= 2 * SMALLEST_LEVEL:
        levels.append((_halved(levels[-1][0]), _halved(levels[-1][1])))
    flow_N2HW = before_N1HW.new_zeros(len(before_N1HW), 2, *levels[-1][0].shape[2:])
    for before, after in reversed(levels):
        flow_N2HW = _resized_flow(flow_N2HW, before.shape[2], before.shape[3])
        flow_N2HW = _refined(flow_N2HW, before, after)
    return flow_N2HW


def grey(frames_THWC: Tensor) -> Tensor:
    """Luma of uint8 RGB frames (BT.601's weights) in [0, 1]: fp32 ``[T, 1, H, W]``."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames_THWC.device)
    return (frames_THWC.float() @ weights / 255)[:, None]


def reduced(picture_N1HW: Tensor) -> Tensor:
    """The pictures with a longer side of at most :data:`LONGEST_SIDE`, averaged over pixels."""
    height, width = picture_N1HW.shape[2:]
    if max(height, width) <= LONGEST_SIDE:
        return picture_N1HW
    factor = LONGEST_SIDE / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(picture_N1HW, size=size, mode="bilinear", align_corners=False, antialias=True)


def _exposed_like(picture_N1HW: Tensor, wanted_N1HW: Tensor) -> Tensor:
    """The pictures with the wanted ones' mean and spread of brightness, since a change of exposure moves nothing."""
    dims = (1, 2, 3)
    spread, wanted = (value.std(dim=dims, keepdim=True) for value in (picture_N1HW, wanted_N1HW))
    gain = torch.where(spread > 0, wanted / spread.clamp_min(torch.finfo(spread.dtype).tiny), 1.0)
    return (picture_N1HW - picture_N1HW.mean(dim=dims, keepdim=True)) * gain + wanted_N1HW.mean(dim=dims, keepdim=True)


def _refined(flow_N2HW: Tensor, before_N1HW: Tensor, after_N1HW: Tensor) -> Tensor:
    """A few steps of Gauss and Newton at one level: sum(g g^T) step = -sum(g difference) in each pixel's window."""
    across_N1HW, down_N1HW = _gradients(before_N1HW)
    energy_N3HW = _blurred(torch.cat((across_N1HW**2, down_N1HW**2, across_N1HW * down_N1HW), dim=1), WINDOW_SIGMA)
    across2, down2, cross = (part + ridge for part, ridge in zip(energy_N3HW.unbind(1), (RIDGE, RIDGE, 0), strict=True))
    determinant = across2 * down2 - cross**2
    for _ in range(ITERATIONS):
        difference_N1HW = _warped(after_N1HW, flow_N2HW) - before_N1HW
        pull = _blurred(torch.cat((across_N1HW, down_N1HW), dim=1) * difference_N1HW, WINDOW_SIGMA)
        step_across = (down2 * pull[:, 0] - cross * pull[:, 1]) / determinant
        step_down = (across2 * pull[:, 1] - cross * pull[:, 0]) / determinant
        # The least squares are linear within about a pixel; a longer step is left to the next iteration.
        flow_N2HW = flow_N2HW - torch.stack((step_across, step_down), dim=1).clamp(-1.0, 1.0)
    return flow_N2HW


def _gradients(picture_N1HW: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along columns and rows."""
    padded = F.pad(picture_N1HW, (1, 1, 1, 1), mode="replicate")
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    return across, down


def _blurred(value_NCHW: Tensor, sigma: float) -> Tensor:
    """The Gaussian mean around each pixel."""
    radius = round(2.5 * sigma)
    places = torch.arange(-radius, radius + 1, dtype=value_NCHW.dtype, device=value_NCHW.device)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    channels = value_NCHW.shape[1]
    padded = F.pad(value_NCHW, (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)


def _warped(value_NCHW: Tensor, flow_N2HW: Tensor) -> Tensor:
    """``value(position + flow)``, bilinear; beyond the edge the edge's value."""
    height, width = value_NCHW.shape[2:]
    columns = torch.arange(width, dtype=flow_N2HW.dtype, device=flow_N2HW.device)
    rows = torch.arange(height, dtype=flow_N2HW.dtype, device=flow_N2HW.device)
    across = (flow_N2HW[:, 0] + columns) * (2 / max(1, width - 1)) - 1
    down = (flow_N2HW[:, 1] + rows[:, None]) * (2 / max(1, height - 1)) - 1
    places_NHW2 = torch.stack((across, down), dim=3)
    return F.grid_sample(value_NCHW, places_NHW2, mode="bilinear", padding_mode="border", align_corners=True)


def _halved(picture_N1HW: Tensor) -> Tensor:
    height, width = picture_N1HW.shape[2:]
    return F.interpolate(
        picture_N1HW, size=(height // 2, width // 2), mode="bilinear", align_corners=False, antialias=True
    )


def _resized_flow(flow_N2HW: Tensor, height: int, width: int) -> Tensor:
    if flow_N2HW.shape[2:] == (height, width):
        return flow_N2HW
    factors = flow_N2HW.new_tensor([width / flow_N2HW.shape[3], height / flow_N2HW.shape[2]])
    larger = F.interpolate(flow_N2HW, size=(height, width), mode="bilinear", align_corners=False)
    return larger * factors.view(1, 2, 1, 1)
