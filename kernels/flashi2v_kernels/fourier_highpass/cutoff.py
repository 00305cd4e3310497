"""Distances from the zero frequency, and the search for the cutoff, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-12
"""Added under every square root of a squared magnitude (a zero becomes 1e-6)."""


def squared_radius_map(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Squared distance, in bins, from the zero frequency of a shifted spectrum, whose place is (H//2, W//2).

    Not normalised by height or width: equal distances are circles in bins. The squares are whole numbers that
    fp32 holds exactly, so that rings compare exactly.

    Returns:
        fp32 [H, W].
    """
    rows_H = torch.arange(height, dtype=torch.float32, device=device) - height // 2
    columns_W = torch.arange(width, dtype=torch.float32, device=device) - width // 2
    return rows_H[:, None].square() + columns_W[None, :].square()


def squared_cutoff(magnitude_BHW: Tensor, squared_radius_HW: Tensor, ratio_B: Tensor) -> Tensor:
    """The ring at which the summed magnitude, from the centre outward, reaches ``ratio`` of the total.

    Args:
        magnitude_BHW: the shifted spectrum's magnitude, averaged over channels.
        squared_radius_HW: of :func:`squared_radius_map`.
        ratio_B: share of each image's magnitude to remove, clamped to [0, 1].

    Returns:
        squared radius of the cutoff ring, [B]; bins at or beyond it pass. 0 when the ratio is 0 or the zero
        frequency alone holds the share: then everything passes. At 1 the outermost ring passes.
    """
    sorted_radius_N, order_N = squared_radius_HW.flatten().sort(stable=True)
    summed_BN = prefix_sums(magnitude_BHW.flatten(1)[:, order_N])
    share_B1 = ratio_B.to(summed_BN).clamp(0.0, 1.0)[:, None]
    index_B = (summed_BN < share_B1 * summed_BN[:, -1:]).sum(dim=1)  # the last sum is never below its share
    return sorted_radius_N[index_B]


def prefix_sums(values_BN: Tensor) -> Tensor:
    """Sums of the first 1, 2, ... N values of each row, the same bits on every run.

    ``torch.cumsum`` has no deterministic implementation on CUDA. Here each of log2(N) rounds doubles how many
    values every sum holds (Hillis and Steele, Data parallel algorithms, 1986).
    """
    reach = 1
    while reach < values_BN.shape[1]:
        values_BN = values_BN + F.pad(values_BN[:, :-reach], (reach, 0))
        reach *= 2
    return values_BN


def require_images(images_BCHW: Tensor, ratio_B: Tensor) -> None:
    """Refuse wrong shapes. Values are not read: that would wait for the device.

    Raises:
        ValueError: images are not four-dimensional, or there is not one ratio for each.
    """
    if images_BCHW.ndim != 4 or tuple(ratio_B.shape) != (images_BCHW.shape[0],):
        raise ValueError(f"images {tuple(images_BCHW.shape)} must be [B, C, H, W] with one ratio each; "
                         f"ratios are {tuple(ratio_B.shape)}")
