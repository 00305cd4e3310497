"""FlashAttention 3 for Hopper (package flash_attn_3, built from the ``hopper`` folder of flash-attention)."""

from __future__ import annotations

import torch
from flash_attn_interface import _flash_attn_backward, flash_attn_func
from torch import Tensor

from flashi2v_kernels.attention.padding import refuse_padded_keys


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
    refuse_padded_keys("flash_attn_3", key_padding_mask_BK)
    output = flash_attn_func(
        query_BQhD, key_BKhD, value_BKhD, softmax_scale=softmax_scale,
        deterministic=torch.are_deterministic_algorithms_enabled(), return_attn_probs=return_log_sum_exp,
    )
    return (output[0], output[1].detach()) if return_log_sum_exp else output


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
    """See :func:`flashi2v_kernels.attention.reference.attention_backward`."""
    query_grad, key_grad, value_grad = (torch.empty_like(tensor) for tensor in (query_BQhD, key_BKhD, value_BKhD))
    _flash_attn_backward(
        grad_output_BQhD, query_BQhD, key_BKhD, value_BKhD, output_BQhD, log_sum_exp_BhQ.float().contiguous(),
        dq=query_grad, dk=key_grad, dv=value_grad,
        softmax_scale=query_BQhD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return query_grad, key_grad, value_grad
