"""cuDNN's attention through torch's operator, called directly: ``torch_sdpa`` does not return its log-sum-exp.

Layouts were seen on a card of compute capability 9.0 with torch 2.11: outputs in the query's layout, the log-sum-exp as
[batch, heads, query tokens, 1]. Backward takes one block of the keys with the output and log-sum-exp over all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashi2v_kernels.attention.padding import refuse_padded_keys

# Both operators want tensors as [batch, heads, tokens, head size], of any strides with unit stride in the last.


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

    Raises:
        NotImplementedError: keys are padded.
    """
    refuse_padded_keys("torch_cudnn", key_padding_mask_BK)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BQhD, key_BKhD, value_BKhD))
    needs_log_sum_exp = return_log_sum_exp or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    )
    output, log_sum_exp_BhQ1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, needs_log_sum_exp, 0.0, False, False, scale=softmax_scale
    )
    output_BQhD = output.transpose(1, 2)
    return (output_BQhD, log_sum_exp_BhQ1.squeeze(-1).detach()) if return_log_sum_exp else output_BQhD


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
    """See :func:`flashi2v_kernels.attention.reference.attention_backward`."""
    heads_first = (
        tensor.transpose(1, 2) for tensor in (grad_output_BQhD, query_BQhD, key_BKhD, value_BKhD, output_BQhD)
    )
    # The random state is not read without dropout; cumulative lengths belong to packed sequences.
    random_state = torch.empty((), dtype=torch.int64, device=query_BQhD.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first,
        log_sum_exp_BhQ.contiguous().unsqueeze(-1),
        random_state,
        random_state,
        None,
        None,
        None,
        query_BQhD.shape[1],
        key_BKhD.shape[1],
        0.0,
        False,
        scale=softmax_scale,
    )
    grad_query, grad_key, grad_value = (gradient.transpose(1, 2) for gradient in gradients)
    return grad_query, grad_key, grad_value
