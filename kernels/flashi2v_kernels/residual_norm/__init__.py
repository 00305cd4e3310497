"""Add a layer's update to the residual stream, and normalise the sum for the next layer."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import COMPILED_ON, FLOATS, KernelSpec

SPECS = (
    KernelSpec(
        operator="residual_norm",
        name="triton",
        entry_point="flashi2v_kernels.residual_norm.triton:residual_norm",
        devices=("cuda",),
        min_compute_capability=(8, 0),
        package="triton",
        min_version="3.0",
    ),
    KernelSpec(
        operator="residual_norm",
        name="torch",
        entry_point="flashi2v_kernels.residual_norm.torch:residual_norm",
        dtypes=(*FLOATS, torch.float64),
    ),
    KernelSpec(
        operator="residual_norm",
        name="triton_fused",
        entry_point="flashi2v_kernels.residual_norm.triton_fused:residual_norm",
        devices=("cuda",),
        min_compute_capability=(8, 0),
        package="triton",
        min_version="3.0",
        timed=False,
    ),
    KernelSpec(
        operator="residual_norm",
        name="inductor",
        entry_point="flashi2v_kernels.residual_norm.inductor:residual_norm",
        devices=COMPILED_ON,
        dtypes=(*FLOATS, torch.float64),
        timed=False,
    ),
    KernelSpec(
        operator="residual_norm",
        name="reference",
        entry_point="flashi2v_kernels.residual_norm.reference:residual_norm",
        dtypes=(*FLOATS, torch.float64),
    ),
)
