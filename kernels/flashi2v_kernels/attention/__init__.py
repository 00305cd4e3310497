"""Full attention over [batch, tokens, heads, head size], optionally with padded keys and the log-sum-exp.

An implementation with ``block_backward`` also has the gradients that come from one block of the keys: what ring
attention needs beside the log-sum-exp.
"""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import ANY_DEVICE, FLOATS, KernelSpec

KEY_PADDING = "key_padding"
LOG_SUM_EXP = "log_sum_exp"
BLOCK_BACKWARD = "block_backward"

SPECS = (
    KernelSpec(
        operator="attention",
        name="torch_sdpa",
        entry_point="flashi2v_kernels.attention.torch_sdpa:attention",
        backward_entry_point="flashi2v_kernels.attention.torch_sdpa:attention_backward",
        dtypes=(*FLOATS, torch.float64),
        features={KEY_PADDING: ANY_DEVICE, LOG_SUM_EXP: ("cpu",), BLOCK_BACKWARD: ("cpu",)},
    ),
    KernelSpec(
        operator="attention",
        name="torch_flash",
        entry_point="flashi2v_kernels.attention.torch_flash:attention",
        backward_entry_point="flashi2v_kernels.attention.torch_flash:attention_backward",
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        min_compute_capability=(8, 0),
        max_head_dim=256,
        head_dim_multiple=8,
        features={LOG_SUM_EXP: ("cuda",), BLOCK_BACKWARD: ("cuda",)},
    ),
    KernelSpec(
        operator="attention",
        name="reference",
        entry_point="flashi2v_kernels.attention.reference:attention",
        backward_entry_point="flashi2v_kernels.attention.reference:attention_backward",
        dtypes=(*FLOATS, torch.float64),
        features={KEY_PADDING: ANY_DEVICE, LOG_SUM_EXP: ANY_DEVICE, BLOCK_BACKWARD: ANY_DEVICE},
    ),
)
