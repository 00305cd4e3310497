"""Measures motion: differences between frames, optical flow, and whether a video is frozen.

Too little motion beside the reference is how a leaked condition image shows. Differences between frames count flicker
and noise as motion, optical flow does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_flashi2v.evaluation.flow import flow_magnitudes

STILL_FLOW = 1e-4
"""Mean flow, as a share of the longer side a frame, under which a reference does not move: nothing can be frozen
beside it."""


@dataclass(frozen=True, kw_only=True)
class Motion:
    """Of one video, from each frame to the next.

    Attributes:
        differences: mean absolute difference in 8-bit levels, fp64 ``[T - 1]``.
        flow: mean length of the optical flow as a share of the longer side, fp64 ``[T - 1]``.
    """

    differences: NDArray[np.float64]
    flow: NDArray[np.float64]


def motion_of(frames_THWC: torch.Tensor) -> Motion:
    """Measure uint8 RGB frames, at least two."""
    whole = frames_THWC.to(torch.int16)
    differences = [(after - before).abs().float().mean() for before, after in zip(whole, whole[1:], strict=False)]
    return Motion(
        differences=torch.stack(differences).double().cpu().numpy(),
        flow=flow_magnitudes(frames_THWC).double().cpu().numpy(),
    )


def flow_ratio(video: Motion, reference: Motion) -> float | None:
    """The video's flow as a share of its reference's; None beside a reference that does not move."""
    expected = float(reference.flow.mean())
    return None if expected < STILL_FLOW else float(video.flow.mean()) / expected
