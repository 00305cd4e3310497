"""The convolutions of TransNetV2, over the weights that its authors' package ships.

Written from the paper (T. Soucek, J. Lokoc, "TransNet V2: An effective deep network architecture for fast shot
transition detection", arXiv 2008.04838): three stacks of two cells, each of which looks at four scales of time. The
paper's next layers, the comparison with a hundred frames around and the classifier, require longer chunks.

Shapes: B clips, T frames, H and W rows and columns, C channels (3 colours at first).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

HEIGHT, WIDTH = 27, 48
"""Pixels that the network takes."""
CHANNELS = 256
"""Of the last stack."""
STACKS = 3
DILATIONS = (1, 2, 4, 8)
BATCH_NORM_EPS = 1e-3


class TransNetV2:
    """The network in evaluation mode.

    Args:
        weights: the tensors of the package's weight file, by name.
        device: where it runs.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device | str) -> None:
        self._weights = {name: value.to(device) for name, value in weights.items() if name.startswith("SDDCNN.")}

    @torch.no_grad()
    def last_stack(self, colours_BCTHW: Tensor) -> Tensor:
        """Activations after the last stack.

        Args:
            colours_BCTHW: fp32 RGB in [0, 1] of 27 x 48 pixels, on the network's device.

        Returns:
            fp32 ``[B, 256, T, 3, 6]``.
        """
        hidden_BCTHW = colours_BCTHW
        for stack in range(STACKS):
            # A residual around the second cell, then half the resolution.
            first = F.relu(self._cell(f"SDDCNN.{stack}.DDCNN.0", hidden_BCTHW))
            second = F.relu(self._cell(f"SDDCNN.{stack}.DDCNN.1", first))
            hidden_BCTHW = F.avg_pool3d(first + second, (1, 2, 2))
        return hidden_BCTHW

    def _cell(self, name: str, hidden_BCTHW: Tensor) -> Tensor:
        """Separable convolutions of four dilations in time, side by side, normalised."""
        branches = [self._convolution(f"{name}.Conv3D_{dilation}.layers", hidden_BCTHW, dilation)
                    for dilation in DILATIONS]  # fmt: skip
        mean, variance, weight, bias = (
            self._weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(torch.cat(branches, dim=1), mean, variance, weight, bias, eps=BATCH_NORM_EPS)

    def _convolution(self, name: str, hidden_BCTHW: Tensor, dilation: int) -> Tensor:
        """Over pixels, then over frames."""
        hidden_BCTHW = F.conv3d(hidden_BCTHW, self._weights[f"{name}.0.weight"], padding=(0, 1, 1))
        return F.conv3d(
            hidden_BCTHW, self._weights[f"{name}.1.weight"], padding=(dilation, 0, 0), dilation=(dilation, 1, 1)
        )
