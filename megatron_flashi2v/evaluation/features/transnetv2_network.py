"""The network TransNetV2, up to its last hidden layer, over the weights that its authors' package ships.

Written from the paper (Soucek and Lokoc, TransNet V2, arXiv 2008.04838): three stacks of two dilated cells each, beside
them how alike each frame is to the hundred around it, by learned features and by colours.

Shapes: B clips, C channels, T frames, H and W rows and columns, D features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

HEIGHT, WIDTH = 27, 48
"""Pixels that the network takes."""
WIDTH_OF_FEATURES = 1024
STACKS, CELLS = 3, 2
DILATIONS = (1, 2, 4, 8)
NEIGHBOURS = 50
"""Frames on either side that a frame is compared with."""
COLOUR_LEVELS = 8
BATCH_NORM_EPS = 1e-3


class TransNetV2:
    """The network in evaluation mode.

    Args:
        weights: the tensors of the package's weight file, by name.
        device: where it runs.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device | str) -> None:
        self._weights = {name: value.to(device) for name, value in weights.items()}

    @torch.no_grad()
    def hidden(self, frames_BTHWC: Tensor) -> Tensor:
        """The hidden layer before the two classifiers.

        Args:
            frames_BTHWC: uint8 RGB of 27 x 48 pixels, on the network's device.

        Returns:
            fp32 ``[B, T, 1024]``, none below 0.
        """
        hidden_BCTHW = frames_BTHWC.permute(0, 4, 1, 2, 3).float() / 255
        pooled = []
        for stack in range(STACKS):
            hidden_BCTHW = self._stack(stack, hidden_BCTHW)
            pooled.append(hidden_BCTHW.mean(dim=(3, 4)))
        hidden_BTD = hidden_BCTHW.permute(0, 2, 3, 4, 1).flatten(2)
        alike_BTD = self._frame_similarity(torch.cat(pooled, dim=1).transpose(1, 2))
        colours_BTD = self._colour_similarity(frames_BTHWC)
        return F.relu(self._linear("fc1", torch.cat((colours_BTD, alike_BTD, hidden_BTD), dim=2)))

    def _stack(self, stack: int, hidden_BCTHW: Tensor) -> Tensor:
        """Two cells with a residual around the second, then half the resolution."""
        first = F.relu(self._cell(f"SDDCNN.{stack}.DDCNN.0", hidden_BCTHW))
        second = self._cell(f"SDDCNN.{stack}.DDCNN.1", first)
        return F.avg_pool3d(F.relu(second) + first, (1, 2, 2))

    def _cell(self, name: str, hidden_BCTHW: Tensor) -> Tensor:
        """Separable convolutions of four dilations in time, side by side."""
        branches = [self._convolution(f"{name}.Conv3D_{dilation}.layers", hidden_BCTHW, dilation)
                    for dilation in DILATIONS]  # fmt: skip
        weights = self._weights
        return F.batch_norm(
            torch.cat(branches, dim=1),
            weights[f"{name}.bn.running_mean"],
            weights[f"{name}.bn.running_var"],
            weights[f"{name}.bn.weight"],
            weights[f"{name}.bn.bias"],
            eps=BATCH_NORM_EPS,
        )

    def _convolution(self, name: str, hidden_BCTHW: Tensor, dilation: int) -> Tensor:
        """Over pixels, then over frames."""
        hidden_BCTHW = F.conv3d(hidden_BCTHW, self._weights[f"{name}.0.weight"], padding=(0, 1, 1))
        return F.conv3d(
            hidden_BCTHW, self._weights[f"{name}.1.weight"], padding=(dilation, 0, 0), dilation=(dilation, 1, 1)
        )

    def _frame_similarity(self, features_BTD: Tensor) -> Tensor:
        directions = F.normalize(self._linear("frame_sim_layer.projection", features_BTD), dim=2)
        return F.relu(self._linear("frame_sim_layer.fc", self._neighbours(directions)))

    def _colour_similarity(self, frames_BTHWC: Tensor) -> Tensor:
        histograms = F.normalize(colour_histograms(frames_BTHWC), dim=2)
        return F.relu(self._linear("color_hist_layer.fc", self._neighbours(histograms)))

    @staticmethod
    def _neighbours(directions_BTD: Tensor) -> Tensor:
        """Cosines of each frame to the frames around it, 0 beyond the ends: [B, T, 101]."""
        cosines_BTT = directions_BTD @ directions_BTD.transpose(1, 2)
        padded = F.pad(cosines_BTT, (NEIGHBOURS, NEIGHBOURS))
        frames = cosines_BTT.shape[1]
        places = torch.arange(frames, device=padded.device)[:, None] + torch.arange(
            2 * NEIGHBOURS + 1, device=padded.device
        )
        return padded.gather(2, places.expand(len(padded), -1, -1))

    def _linear(self, name: str, value: Tensor) -> Tensor:
        return F.linear(value, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])


def colour_histograms(frames_BTHWC: Tensor) -> Tensor:
    """Pixels of each of 512 colours, eight levels a channel.

    Args:
        frames_BTHWC: uint8 RGB.

    Returns:
        fp32 ``[B, T, 512]``.
    """
    level = frames_BTHWC.long() * COLOUR_LEVELS // 256
    colour_BTN = ((level[..., 0] * COLOUR_LEVELS + level[..., 1]) * COLOUR_LEVELS + level[..., 2]).flatten(2)
    counts = torch.zeros(*colour_BTN.shape[:2], COLOUR_LEVELS**3, device=frames_BTHWC.device)
    return counts.scatter_add_(2, colour_BTN, torch.ones_like(colour_BTN, dtype=counts.dtype))
