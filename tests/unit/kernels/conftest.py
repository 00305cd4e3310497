"""The tolerances of all kernel tests, in one place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# Largest error allowed, over the largest magnitude of the fp64 reference's result for the same inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """``assert_near(actual, reference, scale)``: within the tolerance of ``actual``'s dtype times the scale.

    The scale is the reference's largest magnitude, unless the result is a small difference of larger numbers.
    """

    def check(actual: Tensor, reference: Tensor, scale: Tensor | None = None) -> None:
        assert actual.shape == reference.shape
        assert torch.isfinite(actual).all()
        error = (actual.detach().double() - reference.detach().double()).abs().max().item()
        limit = TOLERANCE[actual.dtype] * float(reference.detach().abs().max() if scale is None else scale)
        assert error <= limit, f"{actual.dtype}: error {error:.3g} above {limit:.3g}"

    return check
