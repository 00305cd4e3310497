"""Rotary position embedding over time, height and width: interleaved pairs, tables in :mod:`.tables`."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import ASCEND_A2_A3, FLOATS, KernelSpec

SPECS = (
    KernelSpec(
        operator="rope3d",
        name="npu_rotary_mul",
        entry_point="flashi2v_kernels.rope3d.npu:apply_rope",
        devices=("npu",),
        socs=ASCEND_A2_A3,
        package="torch_npu",
        max_head_dim=894,
        head_dim_multiple=2,
    ),
    KernelSpec(
        operator="rope3d",
        name="torch",
        entry_point="flashi2v_kernels.rope3d.torch:apply_rope",
        dtypes=(*FLOATS, torch.float64),
        head_dim_multiple=2,
    ),
    KernelSpec(
        operator="rope3d",
        name="reference",
        entry_point="flashi2v_kernels.rope3d.reference:apply_rope",
        dtypes=(*FLOATS, torch.float64),
        head_dim_multiple=2,
    ),
)
