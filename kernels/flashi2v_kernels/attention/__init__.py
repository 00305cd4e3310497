"""Full attention over [batch, tokens, heads, head size], optionally with padded keys and the log-sum-exp."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import ANY_DEVICE, ASCEND_A2_A3, FLOATS, KernelSpec

KEY_PADDING = "key_padding"
LOG_SUM_EXP = "log_sum_exp"

SPECS = (
    KernelSpec(
        operator="attention",
        name="npu_fusion_attention",
        entry_point="flashi2v_kernels.attention.npu:attention",
        devices=("npu",),
        socs=ASCEND_A2_A3,
        package="torch_npu",
        max_head_dim=768,
        features={KEY_PADDING: ("npu",), LOG_SUM_EXP: ("npu",)},
    ),
    KernelSpec(
        operator="attention",
        name="torch_sdpa",
        entry_point="flashi2v_kernels.attention.torch_sdpa:attention",
        dtypes=(*FLOATS, torch.float64),
        features={KEY_PADDING: ANY_DEVICE, LOG_SUM_EXP: ("cpu",)},
    ),
    KernelSpec(
        operator="attention",
        name="reference",
        entry_point="flashi2v_kernels.attention.reference:attention",
        dtypes=(*FLOATS, torch.float64),
        features={KEY_PADDING: ANY_DEVICE, LOG_SUM_EXP: ANY_DEVICE},
    ),
)
