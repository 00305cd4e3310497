"""Where the golden vectors are: ``FLASHI2V_GOLDENS``, or ``shared/goldens`` beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden vectors; without one at the usual place the tests are skipped."""
    named = os.environ.get("FLASHI2V_GOLDENS")
    if named is not None:
        if not Path(named).is_dir():
            pytest.fail(f"FLASHI2V_GOLDENS is {named!r}, which is no folder")
        return Path(named)
    usual = Path(__file__).resolve().parents[3] / "shared" / "goldens"
    if not usual.is_dir():
        pytest.skip(f"no golden vectors: {usual} does not exist and FLASHI2V_GOLDENS is not set")
    return usual
