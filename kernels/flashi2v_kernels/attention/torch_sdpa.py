"""torch's scaled dot product attention, which picks a fused kernel for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def backends_of(compute_capability: tuple[int, int]) -> list[SDPBackend]:
    """torch's kernels for a CUDA device, the fastest first; torch takes the first that fits.

    cuDNN's is 1.7 times as fast as torch's flash kernel on an H200 (measured), but slower on an A100 and on consumer
    cards of compute capability 12.0 (reported).
    """
    fastest = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if compute_capability[0] not in (9, 10):
        fastest.reverse()
    return [*fastest, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    query_BQhD: Tensor,
    key_BKhD: Tensor,
    value_BKhD: Tensor,
    *,
    softmax_scale: float | None = None,
    key_padding_mask_BK: Tensor | None = None,
    return_log_sum_exp: bool = False,
    compute_capability: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`flashi2v_kernels.attention.reference.attention`.

    On CUDA ``compute_capability`` puts torch's kernels in order, by :func:`backends_of`; None leaves it to torch.

    Raises:
        NotImplementedError: ``return_log_sum_exp`` on another device than the CPU.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BQhD, key_BKhD, value_BKhD))
    # [B, 1, 1, K] broadcasts over heads and queries; without padding there is no mask, which flash kernels refuse
    mask = None if key_padding_mask_BK is None else key_padding_mask_BK[:, None, None, :]
    if not return_log_sum_exp:
        if compute_capability is None:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax_scale)
        else:
            with sdpa_kernel(backends_of(compute_capability), set_priority=True):
                output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax_scale)
        return output.transpose(1, 2)
    if query.device.type != "cpu":
        raise NotImplementedError("torch_sdpa returns the log-sum-exp on the CPU only")
    if mask is not None:
        # this operator takes only an additive mask in the query's dtype
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=softmax_scale
    )
    return output.transpose(1, 2), log_sum_exp.detach()


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

    Raises:
        NotImplementedError: on another device than the CPU.
    """
    if query_BQhD.device.type != "cpu":
        raise NotImplementedError("torch_sdpa has a backward of one block on the CPU only")
    heads_first = (
        tensor.transpose(1, 2) for tensor in (grad_output_BQhD, query_BQhD, key_BKhD, value_BKhD, output_BQhD)
    )
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, log_sum_exp_BhQ, 0.0, False, scale=softmax_scale
    )
    grad_query, grad_key, grad_value = (gradient.transpose(1, 2) for gradient in gradients)
    return grad_query, grad_key, grad_value
