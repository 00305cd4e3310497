"""Root-mean-square norm over the full hidden width, of which a tensor-parallel rank holds a slice."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import FLOATS, KernelSpec

SPECS = (
    KernelSpec(
        operator="rms_norm",
        name="torch",
        entry_point="flashi2v_kernels.rms_norm.torch:rms_norm",
        dtypes=(*FLOATS, torch.float64),
    ),
    KernelSpec(
        operator="rms_norm",
        name="reference",
        entry_point="flashi2v_kernels.rms_norm.reference:rms_norm",
        dtypes=(*FLOATS, torch.float64),
    ),
)
