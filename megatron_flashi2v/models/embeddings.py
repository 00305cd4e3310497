"""Embeddings of text rows, of an image encoder's rows and of the timestep, on the first stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.linear import FusedColumnParallelLinear, column_parallel, replicated_fp32, row_parallel

CONDITIONING_ROWS = 7
"""Rows that travel beside the tokens: the time embedding and its six projections."""


class TextEmbedding(nn.Module):
    """Linear, tanh-approximated GELU, Linear on the text encoder's rows, sharded like a feed-forward layer."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.config.hidden_size
        self.dtype = spec.dtype
        self.activation = spec.kernels.bias_gelu_tanh
        self.linear_1 = column_parallel(
            spec.column_linear, spec.config.text_dim, width, spec.megatron, spec.groups, skip_bias_add=True
        )
        self.linear_2 = row_parallel(spec.row_linear, width, width, spec.megatron, spec.groups)

    def forward(self, text_TBX: Tensor) -> Tensor:
        """Text rows [T, B, d] of this rank."""
        return self.linear_2(self.activation(*self.linear_1(text_TBX.to(self.dtype))))[0]


class ImageEmbedding(nn.Module):
    """LayerNorm, Linear, exact GELU, Linear, LayerNorm on an image encoder's rows, in fp32 on every rank."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        inner, width = spec.config.image_dim, spec.config.hidden_size
        self.norm_in = nn.LayerNorm(inner, dtype=torch.float32)
        self.linear_1 = nn.Linear(inner, inner, dtype=torch.float32)
        self.linear_2 = nn.Linear(inner, width, dtype=torch.float32)
        self.norm_out = nn.LayerNorm(width, dtype=torch.float32)

    def forward(self, rows_RBX: Tensor) -> Tensor:
        """Image rows [R, B, d] of this rank, fp32."""
        return self.norm_out(self.linear_2(F.gelu(self.linear_1(self.norm_in(rows_RBX.float())))))


class TimeEmbedding(nn.Module):
    """MLP and six-way projection of the timestep's sinusoid, in fp32 on every rank; the projection is sharded."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.config.hidden_size
        self.linear_1 = nn.Linear(spec.config.freq_dim, width, dtype=torch.float32)
        self.linear_2 = nn.Linear(width, width, dtype=torch.float32)
        # Transformer Engine's linears do not gather their outputs.
        self.projection = column_parallel(
            FusedColumnParallelLinear, width, 6 * width, replicated_fp32(spec.megatron), spec.groups, gather_output=True
        )

    def forward(self, sinusoid_BF: Tensor) -> Tensor:
        """Conditioning rows [7, B, d], fp32: the time embedding and its six projections.

        Args:
            sinusoid_BF: :func:`~megatron_flashi2v.flow.sinusoid.timestep_sinusoid` of the timesteps, fp32.
        """
        time_BD = self.linear_2(F.silu(self.linear_1(sinusoid_BF)))
        projected, _ = self.projection(F.silu(time_BD))
        return torch.cat([time_BD.unsqueeze(0), projected.unflatten(-1, (6, -1)).transpose(0, 1)])


def time_and_modulation(conditioning_7BD: Tensor) -> tuple[Tensor, Tensor]:
    """Split the rows of :class:`TimeEmbedding` into the time embedding [B, d] and its six projections [6, B, d]."""
    return conditioning_7BD[0], conditioning_7BD[1:]
