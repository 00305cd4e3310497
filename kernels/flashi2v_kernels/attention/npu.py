"""Ascend's fused attention, ``torch_npu.npu_fusion_attention``, forward and backward of blocks of keys."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

_LAYOUT = "BSND"  # batch, tokens, heads, head size
_REPLICAS = 8  # the operator repeats its softmax statistics eight times, in a last dimension


def attention(
    query_BQhD: Tensor,
    key_BKhD: Tensor,
    value_BKhD: Tensor,
    *,
    softmax_scale: float | None = None,
    key_padding_mask_BK: Tensor | None = None,
    return_log_sum_exp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`flashi2v_kernels.attention.reference.attention`.

    A padding mask becomes one byte for each pair of a query and a key: the operator has no smaller form.
    """
    mask = None
    if key_padding_mask_BK is not None:  # here True masks a key out, and the operator takes the whole matrix
        mask = ~key_padding_mask_BK[:, None, None, :].expand(-1, 1, query_BQhD.shape[1], -1)
    output_BQhD, max_BhQ8, sum_BhQ8, *_ = torch_npu.npu_fusion_attention(
        query_BQhD, key_BKhD, value_BKhD, query_BQhD.shape[2], _LAYOUT, atten_mask=mask,
        scale=_scale(query_BQhD, softmax_scale), sparse_mode=0 if mask is None else 1,
    )
    if not return_log_sum_exp:
        return output_BQhD
    return output_BQhD, (max_BhQ8[..., 0] + sum_BhQ8[..., 0].log()).detach()


@torch.no_grad()
def attention_backward(
    grad_output_BQhD: Tensor,
    query_BQhD: Tensor,
    key_BKhD: Tensor,
    value_BKhD: Tensor,
    output_BQhD: Tensor,
    log_sum_exp_BhQ: Tensor,
    *,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`flashi2v_kernels.attention.reference.attention_backward`.

    The operator takes the softmax's maximum and sum, and computes ``exp(score - maximum) / sum``: the log-sum-exp and
    1 are such a pair.
    """
    statistics_BhQ8 = log_sum_exp_BhQ.float().unsqueeze(-1).expand(-1, -1, -1, _REPLICAS).contiguous()
    grads = torch_npu.npu_fusion_attention_grad(
        query_BQhD, key_BKhD, value_BKhD, grad_output_BQhD, query_BQhD.shape[2], _LAYOUT,
        softmax_max=statistics_BhQ8, softmax_sum=torch.ones_like(statistics_BhQ8), attention_in=output_BQhD,
        scale_value=_scale(query_BQhD, softmax_scale),
    )
    return grads[0], grads[1], grads[2]


def _scale(query_BQhD: Tensor, softmax_scale: float | None) -> float:
    return query_BQhD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
