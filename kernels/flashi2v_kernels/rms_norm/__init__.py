"""Root-mean-square norm over the full hidden width, of which a tensor-parallel rank holds a slice."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import ANY_DEVICE, ASCEND_A2_A3, COMPILED_ON, FLOATS, KernelSpec

PARTIAL_SUMS = "partial_sums"
"""The norm from sums of squares that were added over the ranks which share the width."""

SPECS = (
    KernelSpec(
        operator="rms_norm",
        name="triton",
        entry_point="flashi2v_kernels.rms_norm.triton:rms_norm",
        devices=("cuda",),
        min_compute_capability=(8, 0),
        package="triton",
        min_version="3.0",
        features={PARTIAL_SUMS: ("cuda",)},
    ),
    KernelSpec(
        operator="rms_norm",
        name="npu_rms_norm",
        entry_point="flashi2v_kernels.rms_norm.npu:rms_norm",
        devices=("npu",),
        socs=ASCEND_A2_A3,
        package="torch_npu",
    ),
    KernelSpec(
        operator="rms_norm",
        name="torch",
        entry_point="flashi2v_kernels.rms_norm.torch:rms_norm",
        dtypes=(*FLOATS, torch.float64),
        features={PARTIAL_SUMS: ANY_DEVICE},
    ),
    KernelSpec(
        operator="rms_norm",
        name="inductor",
        entry_point="flashi2v_kernels.rms_norm.inductor:rms_norm",
        devices=COMPILED_ON,
        dtypes=(*FLOATS, torch.float64),
        features={PARTIAL_SUMS: COMPILED_ON},
        timed=False,
    ),
    KernelSpec(
        operator="rms_norm",
        name="reference",
        entry_point="flashi2v_kernels.rms_norm.reference:rms_norm",
        dtypes=(*FLOATS, torch.float64),
        features={PARTIAL_SUMS: ANY_DEVICE},
    ),
)
