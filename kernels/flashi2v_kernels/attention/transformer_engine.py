"""Transformer Engine's attention, which picks cuDNN's or FlashAttention's kernel itself."""

from __future__ import annotations

import functools

from torch import Tensor, nn
from transformer_engine.pytorch import DotProductAttention


def attention(
    query_BQhD: Tensor,
    key_BKhD: Tensor,
    value_BKhD: Tensor,
    *,
    softmax_scale: float | None = None,
    key_padding_mask_BK: Tensor | None = None,
    return_log_sum_exp: bool = False,
) -> Tensor:
    """See :func:`flashi2v_kernels.attention.reference.attention`.

    Raises:
        NotImplementedError: keys are padded, or ``return_log_sum_exp``.
    """
    if key_padding_mask_BK is not None or return_log_sum_exp:
        raise NotImplementedError("transformer_engine takes no padded keys and returns no log-sum-exp")
    heads, head_dim = query_BQhD.shape[-2:]
    module = _attention_of(heads, head_dim, head_dim**-0.5 if softmax_scale is None else softmax_scale)
    return module(query_BQhD, key_BKhD, value_BKhD).unflatten(-1, (heads, head_dim))


@functools.cache
def _attention_of(heads: int, head_dim: int, softmax_scale: float) -> nn.Module:
    """A module without parameters, one for each set of sizes."""
    return DotProductAttention(
        heads, head_dim, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="no_mask",
        softmax_scale=softmax_scale,
    )
