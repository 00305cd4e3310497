"""The kernel tests' comparison as a fixture; the tolerances are in tests/helpers/kernels.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import kernels


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """See :func:`helpers.kernels.assert_near`."""
    return kernels.assert_near
