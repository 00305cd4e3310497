"""Queries' or keys' RMS norm over the full width, and their rotation by the token's place."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import ANY_DEVICE, FLOATS, KernelSpec
from flashi2v_kernels.rms_norm import PARTIAL_SUMS

SPECS = (
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
        name="reference",
        entry_point="flashi2v_kernels.qk_norm_rope.reference:qk_norm_rope",
        dtypes=(*FLOATS, torch.float64),
        features={PARTIAL_SUMS: ANY_DEVICE},
        head_dim_multiple=2,
    ),
)
