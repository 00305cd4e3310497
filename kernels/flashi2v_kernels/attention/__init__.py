"""Full attention over [batch, tokens, heads, head size], optionally with padded keys and the log-sum-exp.

An implementation with ``block_backward`` also computes the gradients from one block of the keys. Ring attention needs
them and the log-sum-exp.
"""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import ANY_DEVICE, ASCEND_A2_A3, FLOATS, HALVES, KernelSpec

KEY_PADDING = "key_padding"
LOG_SUM_EXP = "log_sum_exp"
BLOCK_BACKWARD = "block_backward"

# In the order of their published speeds on an H100 at 16 to 32 thousand tokens; on other cards torch's own is the safe
# choice. torch_sdpa runs the same kernels as torch_cudnn and torch_flash, but cannot serve a ring on CUDA.
SPECS = (
    KernelSpec(
        operator="attention",
        name="npu_fusion_attention",
        entry_point="flashi2v_kernels.attention.npu:attention",
        backward_entry_point="flashi2v_kernels.attention.npu:attention_backward",
        devices=("npu",),
        socs=ASCEND_A2_A3,
        package="torch_npu",
        max_head_dim=768,
        features={KEY_PADDING: ("npu",), LOG_SUM_EXP: ("npu",), BLOCK_BACKWARD: ("npu",)},
    ),
    KernelSpec(
        operator="attention",
        name="flash_attn_3",
        entry_point="flashi2v_kernels.attention.flash_attn_3:attention",
        backward_entry_point="flashi2v_kernels.attention.flash_attn_3:attention_backward",
        devices=("cuda",),
        dtypes=HALVES,
        min_compute_capability=(9, 0),
        max_compute_capability=(9, 0),
        package="flash_attn_3",
        min_version="3.0.0b1",
        max_head_dim=256,
        head_dim_multiple=8,
        features={LOG_SUM_EXP: ("cuda",), BLOCK_BACKWARD: ("cuda",)},
    ),
    KernelSpec(
        operator="attention",
        name="torch_sdpa",
        entry_point="flashi2v_kernels.attention.torch_sdpa:attention",
        takes_compute_capability=True,
        backward_entry_point="flashi2v_kernels.attention.torch_sdpa:attention_backward",
        dtypes=(*FLOATS, torch.float64),
        features={KEY_PADDING: ANY_DEVICE, LOG_SUM_EXP: ("cpu",), BLOCK_BACKWARD: ("cpu",)},
    ),
    KernelSpec(
        operator="attention",
        name="torch_cudnn",
        entry_point="flashi2v_kernels.attention.torch_cudnn:attention",
        backward_entry_point="flashi2v_kernels.attention.torch_cudnn:attention_backward",
        devices=("cuda",),
        dtypes=HALVES,
        min_compute_capability=(9, 0),
        max_compute_capability=(10, 9),
        max_head_dim=128,
        head_dim_multiple=8,
        features={LOG_SUM_EXP: ("cuda",), BLOCK_BACKWARD: ("cuda",)},
        deterministic=False,
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
        name="transformer_engine",
        entry_point="flashi2v_kernels.attention.transformer_engine:attention",
        devices=("cuda",),
        dtypes=HALVES,
        min_compute_capability=(8, 0),
        package="transformer_engine",
        min_version="2.0",
        max_head_dim=128,
        head_dim_multiple=8,
    ),
    KernelSpec(
        operator="attention",
        name="flash_attn_2",
        entry_point="flashi2v_kernels.attention.flash_attn_2:attention",
        backward_entry_point="flashi2v_kernels.attention.flash_attn_2:attention_backward",
        devices=("cuda",),
        dtypes=HALVES,
        min_compute_capability=(8, 0),
        package="flash_attn",
        min_version="2.7",
        max_head_dim=256,
        head_dim_multiple=8,
        features={LOG_SUM_EXP: ("cuda",), BLOCK_BACKWARD: ("cuda",)},
    ),
    KernelSpec(
        operator="attention",
        name="flash_attn_4",
        entry_point="flashi2v_kernels.attention.flash_attn_4:attention",
        backward_entry_point="flashi2v_kernels.attention.flash_attn_4:attention_backward",
        devices=("cuda",),
        dtypes=HALVES,
        min_compute_capability=(9, 0),
        max_compute_capability=(10, 9),
        package="flash-attn-4",
        min_version="4.0.0b5",  # older ones refuse a deterministic backward on Hopper
        max_head_dim=128,
        head_dim_multiple=8,
        features={LOG_SUM_EXP: ("cuda",), BLOCK_BACKWARD: ("cuda",)},
        timed=False,
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
