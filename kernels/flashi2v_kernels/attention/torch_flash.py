"""torch's built-in flash attention on CUDA, called directly: ``torch_sdpa`` does not return its log-sum-exp.

The operators' arguments were checked against torch's schemas and shape functions; they have not run on a GPU here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query_BQhD: Tensor,
    key_BKhD: Tensor,
    value_BKhD: Tensor,
    *,
    softmax_scale: float | None = None,
    return_log_sum_exp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`flashi2v_kernels.attention.reference.attention`; takes no padding mask."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BQhD, key_BKhD, value_BKhD))
    output, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, False, False, scale=softmax_scale
    )
    output_BQhD = output.transpose(1, 2)
    return (output_BQhD, log_sum_exp.detach()) if return_log_sum_exp else output_BQhD


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
    random_state = torch.zeros(2, dtype=torch.uint64, device=query_BQhD.device)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *heads_first,
        log_sum_exp_BhQ.contiguous(),  # the kernel assumes contiguous memory
        None,
        None,
        query_BQhD.shape[1],
        key_BKhD.shape[1],
        0.0,
        False,
        random_state,
        random_state,
        scale=softmax_scale,
    )
    grad_query, grad_key, grad_value = (gradient.transpose(1, 2) for gradient in gradients)
    return grad_query, grad_key, grad_value
