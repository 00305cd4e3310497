"""The last stage's head: modulated norm and projection to patches, in fp32."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megatron_flashi2v.models.spec import ModelSpec


class Head(nn.Module):
    """Linear(LN(x) * (1 + scale) + shift), each sample with its own time embedding."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.config.hidden_size
        self.norm = partial(spec.kernels.ada_layer_norm, eps=spec.config.norm_eps, dtype=torch.float32)
        self.modulation = nn.Parameter(torch.empty(2, width))
        self.linear = nn.Linear(width, spec.config.patch_dim, dtype=torch.float32)

    def forward(self, hidden_SBD: Tensor, time_BD: Tensor) -> Tensor:
        """Predicted velocity of this rank's tokens as patches [S, B, P], fp32, channel fastest."""
        shift, scale = (self.modulation.unsqueeze(1) + time_BD).unbind(0)
        return self.linear(self.norm(hidden_SBD, shift, scale))
