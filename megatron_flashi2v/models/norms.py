"""Norms with weights, through the chosen kernels: computed in fp32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flashi2v_kernels.rms_norm.statistics import local_sum_of_squares
from megatron_flashi2v.models.fused_gradient import GradientMemory
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.parallel.regions import sum_both_ways


class ResidualNorm:
    """A layer's update added to the residual stream, and the modulated norm of the sum, in one pass over memory.

    Attributes:
        norm: the norm alone, which computes its result again where only the sum was kept.
    """

    def __init__(self, spec: ModelSpec) -> None:
        options = {"eps": spec.config.norm_eps, "dtype": spec.dtype}
        self.kernel: Callable[..., tuple[Tensor, Tensor]] = partial(spec.kernels.residual_norm, **options)
        self.norm: Callable[..., Tensor] = partial(spec.kernels.ada_layer_norm, **options)

    def __call__(
        self, hidden_SBD: Tensor, update_SBD: Tensor, gate_BD: Tensor | None, shift_BD: Tensor, scale_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and its norm in the dtype of matrix products."""
        return self.kernel(hidden_SBD, update_SBD, gate_BD, shift_BD, scale_BD)


class AffineLayerNorm(nn.Module):
    """The same for a LayerNorm with weight and bias, on this rank's tokens: one row for all samples."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.add_and_norm: Callable[..., tuple[Tensor, Tensor]] = ResidualNorm(spec)
        self.weight = nn.Parameter(torch.empty(spec.config.hidden_size))
        self.bias = nn.Parameter(torch.empty(spec.config.hidden_size))

    def forward(self, hidden_SBD: Tensor, update_SBD: Tensor, gate_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream with the gated update, and its norm in the dtype of matrix products."""
        samples = hidden_SBD.shape[1]
        shift_BD, scale_BD = self.bias.expand(samples, -1), (self.weight - 1.0).expand(samples, -1)
        return self.add_and_norm(hidden_SBD, update_SBD, gate_BD, shift_BD, scale_BD)


class FullWidthRMSNorm(nn.Module):
    """RMSNorm of queries or keys over the whole hidden width, although each rank holds only its heads; then rotation.

    The mean square is summed over the tensor-parallel group and divided by the full width; the weight is this rank's
    slice of it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.group = spec.groups.tp
        self.full_width = spec.config.hidden_size
        self.eps = spec.config.norm_eps
        self.kernels = spec.kernels
        self.weight = nn.Parameter(torch.empty(self.full_width // self.group.size()))

    def forward(
        self,
        heads_SBhD: Tensor,
        squares_SB: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        place: GradientMemory | None = None,
    ) -> Tensor:
        """Normalised and turned heads, same shape and dtype.

        Args:
            heads_SBhD: this rank's heads.
            squares_SB: sums of squares over the heads of all ranks, fp32; None where this rank holds all heads.
            rotary: cos and sin [S, D/2] of the heads' tokens; None for heads that are not turned (cross-attention).
            place: of the gradient of heads that are turned.
        """
        shared = {} if squares_SB is None else {"sum_of_squares": squares_SB, "full_width": self.full_width}
        if rotary is None:
            return self.kernels.rms_norm(heads_SBhD, self.weight, self.eps, **shared)
        return self.kernels.qk_norm_rope(
            heads_SBhD, self.weight, *rotary, self.eps, gradient_memory=place, **shared
        )


def norm_heads(
    *pairs: tuple[FullWidthRMSNorm, Tensor],
    rotary: tuple[Tensor, Tensor] | None = None,
    places: Sequence[GradientMemory | None] = (),
) -> list[Tensor]:
    """Normalise and turn queries and keys with one sum over the tensor-parallel group, in forward and in backward.

    Args:
        pairs: norms, each with its heads [S, B, h, D].
        rotary: cos and sin of the heads' tokens, for all of them.
        places: where the gradients of the heads go, for all or for none.
    """
    group, places = pairs[0][0].group, places or [None] * len(pairs)
    if group.size() == 1:
        return [norm(heads, None, rotary, place) for (norm, heads), place in zip(pairs, places, strict=True)]
    local = [local_sum_of_squares(heads_SBhD, 2) for _, heads_SBhD in pairs]
    squares = sum_both_ways(torch.cat(local), group).split([len(part) for part in local])
    return [
        norm(heads, whole, rotary, place)
        for (norm, heads), whole, place in zip(pairs, squares, places, strict=True)
    ]
