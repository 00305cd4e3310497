"""The definition of attention: the whole score matrix, in at least fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query_BQhD: Tensor,
    key_BKhD: Tensor,
    value_BKhD: Tensor,
    *,
    softmax_scale: float | None = None,
    key_padding_mask_BK: Tensor | None = None,
    return_log_sum_exp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` for every head, over all keys.

    Args:
        query_BQhD: queries, [batch, query tokens, heads, head size].
        key_BKhD: keys, [batch, key tokens, heads, head size].
        value_BKhD: values, same shape as the keys.
        softmax_scale: ``1/sqrt(head size)`` when None.
        key_padding_mask_BK: bool, True for real keys and False for padding; every sample needs a real key.
        return_log_sum_exp: also return the logarithm of each query's softmax denominator.

    Returns:
        [batch, query tokens, heads, head size] in the query's dtype; with it, if asked, the log-sum-exp of
        the scaled scores, [batch, heads, query tokens] in fp32 (fp64 for fp64 inputs), without gradient.
    """
    dtype = torch.promote_types(query_BQhD.dtype, torch.float32)
    scale = query_BQhD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores_BhQK = torch.einsum("bqhd,bkhd->bhqk", query_BQhD.to(dtype), key_BKhD.to(dtype)) * scale
    if key_padding_mask_BK is not None:
        scores_BhQK = scores_BhQK.masked_fill(~key_padding_mask_BK[:, None, None, :], float("-inf"))
    weights_BhQK = torch.softmax(scores_BhQK, dim=-1)
    output_BQhD = torch.einsum("bhqk,bkhd->bqhd", weights_BhQK, value_BKhD.to(dtype)).to(query_BQhD.dtype)
    if return_log_sum_exp:
        return output_BQhD, torch.logsumexp(scores_BhQK.detach(), dim=-1)
    return output_BQhD


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
    """Gradients of attention that come from one block of the keys, given the result over all keys.

    With p = exp(scores - log-sum-exp) and ds = p * (do v^T - sum(do * o)): the block's dq = scale * ds k (summed over
    blocks by the caller), dk = scale * ds^T q and dv = p^T do.

    Args:
        grad_output_BQhD: gradient of the output over all keys.
        query_BQhD: queries.
        key_BKhD: the block's keys.
        value_BKhD: the block's values.
        output_BQhD: the output over all keys.
        log_sum_exp_BhQ: the log-sum-exp over all keys, as :func:`attention` returns it.
        softmax_scale: ``1/sqrt(head size)`` when None.

    Returns:
        gradients of queries, keys and values, in their shapes and dtypes; computed in at least fp32.
    """
    dtype = torch.promote_types(query_BQhD.dtype, torch.float32)
    scale = query_BQhD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    query, key, value = (tensor.to(dtype) for tensor in (query_BQhD, key_BKhD, value_BKhD))
    grad_output, output = grad_output_BQhD.to(dtype), output_BQhD.to(dtype)
    scores_BhQK = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    weights_BhQK = torch.exp(scores_BhQK - log_sum_exp_BhQ.to(dtype).unsqueeze(-1))
    grad_weights_BhQK = torch.einsum("bqhd,bkhd->bhqk", grad_output, value)
    mean_BhQ = torch.einsum("bqhd,bqhd->bhq", grad_output, output)
    grad_scores_BhQK = weights_BhQK * (grad_weights_BhQK - mean_BhQ.unsqueeze(-1)) * scale
    grad_query = torch.einsum("bhqk,bkhd->bqhd", grad_scores_BhQK, key)
    grad_key = torch.einsum("bhqk,bqhd->bkhd", grad_scores_BhQK, query)
    grad_value = torch.einsum("bhqk,bqhd->bkhd", weights_BhQK, grad_output)
    return grad_query.to(query_BQhD.dtype), grad_key.to(key_BKhD.dtype), grad_value.to(value_BKhD.dtype)
