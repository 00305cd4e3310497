"""FlashAttention 4 (package flash-attn-4), written in CuTe for Hopper and Blackwell and compiled on its first call."""

from __future__ import annotations

import torch
from flash_attn.cute.interface import _flash_attn_bwd, flash_attn_func
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
    refuse_padded_keys("flash_attn_4", key_padding_mask_BK)
    output_BQhD, log_sum_exp_BhQ = flash_attn_func(
        query_BQhD, key_BKhD, value_BKhD, softmax_scale=softmax_scale,
        deterministic=torch.are_deterministic_algorithms_enabled(), return_lse=return_log_sum_exp,
    )
    return (output_BQhD, log_sum_exp_BhQ.detach()) if return_log_sum_exp else output_BQhD


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
    query_grad, key_grad, value_grad = _flash_attn_bwd(
        query_BQhD, key_BKhD, value_BKhD, output_BQhD, grad_output_BQhD, log_sum_exp_BhQ.float().contiguous(),
        softmax_scale=softmax_scale, deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return query_grad, key_grad, value_grad
