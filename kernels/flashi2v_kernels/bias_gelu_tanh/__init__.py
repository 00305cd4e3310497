"""A linear's bias and the tanh-approximated GELU."""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import COMPILED_ON, FLOATS, KernelSpec

SPECS = (
    KernelSpec(
        operator="bias_gelu_tanh",
        name="triton",
        entry_point="flashi2v_kernels.bias_gelu_tanh.triton:bias_gelu_tanh",
        devices=("cuda",),
        min_compute_capability=(8, 0),
        package="triton",
        min_version="3.0",
    ),
    KernelSpec(
        operator="bias_gelu_tanh",
        name="torch",
        entry_point="flashi2v_kernels.bias_gelu_tanh.torch:bias_gelu_tanh",
        dtypes=(*FLOATS, torch.float64),
    ),
    KernelSpec(
        operator="bias_gelu_tanh",
        name="inductor",
        entry_point="flashi2v_kernels.bias_gelu_tanh.inductor:bias_gelu_tanh",
        devices=COMPILED_ON,
        dtypes=(*FLOATS, torch.float64),
        timed=False,
    ),
    KernelSpec(
        operator="bias_gelu_tanh",
        name="reference",
        entry_point="flashi2v_kernels.bias_gelu_tanh.reference:bias_gelu_tanh",
        dtypes=(*FLOATS, torch.float64),
    ),
)
