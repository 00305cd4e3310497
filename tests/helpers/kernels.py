"""Which implementations of an operator the kernel tests run, where, and how near to the reference they must come."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashi2v_kernels.registry import load_entry_point, specs_of

# Largest error allowed, over the largest magnitude of the fp64 reference's result for the same inputs. bf16 has 8 bits:
# a result rounds by 2^-9, what it came from did too, and Triton's interpreter truncates.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}

DEVICE = os.environ.get("FLASHI2V_TEST_DEVICE", "cpu")
"""``FLASHI2V_TEST_DEVICE=cuda pytest tests/unit/kernels`` runs what runs on CUDA."""

TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when it is imported, so that these runs have a process of their own."""


def implementations(operator: str) -> dict[str, Callable[..., Any]]:
    """Functions by name: all that run on the device, or Triton's alone in its interpreter's process."""
    specs = specs_of(operator)
    if TRITON_INTERPRETED:
        return {spec.name: load_entry_point(spec) for spec in specs if spec.package == "triton"}
    return {  # compiling takes seconds for each shape and dtype: test_kernels_inductor.py has a few
        spec.name: load_entry_point(spec) for spec in specs if DEVICE in spec.devices and spec.name != "inductor"
    }


def draw(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0, *, mean: float = 0.0) -> Tensor:
    """Normal numbers on the device, the same for every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + mean).to(dtype).to(DEVICE)


def outputs_and_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
    *,
    rounded_to: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """The result and the gradients of a random projection of it, in order of the inputs.

    Args:
        function: of as many tensors.
        inputs: what to differentiate by; None is handed on.
        dtype: of the computation; every input's own when None.
        rounded_to: precision of the gradient that comes from above, so that all dtypes get the same.
    """
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = draw(output.shape, rounded_to, seed=99).to(output.dtype)
    gradients = torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], weights)
    return [output.detach(), *gradients]


def assert_near(actual: Tensor, reference: Tensor, scale: Tensor | None = None) -> None:
    """Within the tolerance of ``actual``'s dtype times the scale.

    The scale is the reference's largest magnitude, unless the result is a small difference of larger numbers.
    """
    assert actual.shape == reference.shape
    assert torch.isfinite(actual).all()
    error = (actual.detach().double() - reference.detach().double()).abs().max().item()
    limit = TOLERANCE[actual.dtype] * float(reference.detach().abs().max() if scale is None else scale)
    assert error <= limit, f"{actual.dtype}: error {error:.3g} above {limit:.3g}"
