"""The kernel tests' comparison as a fixture; the tolerances are in tests/helpers/kernels.py."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from helpers import kernels

from flashi2v_kernels import chunks


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """See :func:`helpers.kernels.assert_near`."""
    return kernels.assert_near


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces of CPUs, of any number of threads, and programs of Triton small: the tests' shapes take several."""
    monkeypatch.setattr(chunks, "piece_bytes", lambda: 2000)
    if (launch := sys.modules.get("flashi2v_kernels.triton_launch")) is not None:
        monkeypatch.setattr(launch, "PARTIAL_SUMS", 3)
    if (gelu := sys.modules.get("flashi2v_kernels.bias_gelu_tanh.triton")) is not None:
        monkeypatch.setattr(gelu, "COLUMNS", 64)


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Let each test compile for itself: the tests' many shapes are more than torch compiles one function for."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
