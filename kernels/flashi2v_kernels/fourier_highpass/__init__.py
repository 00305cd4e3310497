"""High-pass of images in the Fourier domain, with a cutoff found per image from its own spectrum.

See :func:`flashi2v_kernels.fourier_highpass.reference.fourier_highpass` for the definition.
"""

from __future__ import annotations

import torch

from flashi2v_kernels.registry import FLOATS, KernelSpec

SPECS = (
    KernelSpec(
        operator="fourier_highpass",
        name="torch_fft",
        entry_point="flashi2v_kernels.fourier_highpass.torch_fft:fourier_highpass",
        devices=("cuda", "cpu"),  # NPUs lack complex dtypes in part of their operators
        dtypes=FLOATS,
        differentiable=False,
    ),
    KernelSpec(
        operator="fourier_highpass",
        name="matmul_dft",
        entry_point="flashi2v_kernels.fourier_highpass.matmul_dft:fourier_highpass",
        dtypes=FLOATS,
        differentiable=False,
    ),
    KernelSpec(
        operator="fourier_highpass",
        name="reference",
        entry_point="flashi2v_kernels.fourier_highpass.reference:fourier_highpass",
        devices=("cuda", "cpu"),
        dtypes=(*FLOATS, torch.float64),
        differentiable=False,
    ),
)
