"""Queries' or keys' RMS norm over the full width, and their rotation by the token's place."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import ANY_DEVICE, ASCEND_A2_A3, COMPILED_ON, FLOATS, KernelSpec
from flashi2v_kernels.rms_norm import PARTIAL_SUMS

SPECS = (
    KernelSpec(
        operator="qk_norm_rope",
        name="triton",
        entry_point="flashi2v_kernels.qk_norm_rope.triton:qk_norm_rope",
        devices=("cuda",),
        min_compute_capability=(8, 0),
        package="triton",
        min_version="3.0",
        features={PARTIAL_SUMS: ("cuda",)},
        head_dim_multiple=2,
    ),
    KernelSpec(
        operator="qk_norm_rope",
        name="npu_rms_norm_rotary_mul",
        entry_point="flashi2v_kernels.qk_norm_rope.npu:qk_norm_rope",
        devices=("npu",),
        socs=ASCEND_A2_A3,
        package="torch_npu",
        features={PARTIAL_SUMS: ("npu",)},
        max_head_dim=894,
        head_dim_multiple=2,
    ),
    KernelSpec(
        operator="qk_norm_rope",
        name="torch",
        entry_point="flashi2v_kernels.qk_norm_rope.torch:qk_norm_rope",
        dtypes=(*FLOATS, torch.float64),
        features={PARTIAL_SUMS: ANY_DEVICE},
        head_dim_multiple=2,
    ),
    KernelSpec(
        operator="qk_norm_rope",
        name="inductor",
        entry_point="flashi2v_kernels.qk_norm_rope.inductor:qk_norm_rope",
        devices=COMPILED_ON,
        dtypes=(*FLOATS, torch.float64),
        features={PARTIAL_SUMS: COMPILED_ON},
        head_dim_multiple=2,
        timed=False,
    ),
    KernelSpec(
        operator="qk_norm_rope",
        name="reference",
        entry_point="flashi2v_kernels.qk_norm_rope.reference:qk_norm_rope",
        dtypes=(*FLOATS, torch.float64),
        features={PARTIAL_SUMS: ANY_DEVICE},
        head_dim_multiple=2,
    ),
)
