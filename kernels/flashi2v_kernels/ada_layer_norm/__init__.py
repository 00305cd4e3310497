"""LayerNorm without weights, then a scale and a shift for each sample."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import COMPILED_ON, FLOATS, KernelSpec

SPECS = (
    KernelSpec(
        operator="ada_layer_norm",
        name="triton",
        entry_point="flashi2v_kernels.ada_layer_norm.triton:ada_layer_norm",
        devices=("cuda",),
        min_compute_capability=(8, 0),
        package="triton",
        min_version="3.0",
    ),
    KernelSpec(
        operator="ada_layer_norm",
        name="torch",
        entry_point="flashi2v_kernels.ada_layer_norm.torch:ada_layer_norm",
        dtypes=(*FLOATS, torch.float64),
    ),
    KernelSpec(
        operator="ada_layer_norm",
        name="inductor",
        entry_point="flashi2v_kernels.ada_layer_norm.inductor:ada_layer_norm",
        devices=COMPILED_ON,
        dtypes=(*FLOATS, torch.float64),
        timed=False,
    ),
    KernelSpec(
        operator="ada_layer_norm",
        name="reference",
        entry_point="flashi2v_kernels.ada_layer_norm.reference:ada_layer_norm",
        dtypes=(*FLOATS, torch.float64),
    ),
)
