"""Add a layer's update, gated by channel and sample, to the residual stream."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import COMPILED_ON, FLOATS, KernelSpec

SPECS = (
    KernelSpec(
        operator="gate_residual",
        name="triton",
        entry_point="flashi2v_kernels.gate_residual.triton:gate_residual",
        devices=("cuda",),
        min_compute_capability=(8, 0),
        package="triton",
        min_version="3.0",
    ),
    KernelSpec(
        operator="gate_residual",
        name="torch",
        entry_point="flashi2v_kernels.gate_residual.torch:gate_residual",
        dtypes=(*FLOATS, torch.float64),
    ),
    KernelSpec(
        operator="gate_residual",
        name="inductor",
        entry_point="flashi2v_kernels.gate_residual.inductor:gate_residual",
        devices=COMPILED_ON,
        dtypes=(*FLOATS, torch.float64),
        timed=False,
    ),
    KernelSpec(
        operator="gate_residual",
        name="reference",
        entry_point="flashi2v_kernels.gate_residual.reference:gate_residual",
        dtypes=(*FLOATS, torch.float64),
    ),
)
