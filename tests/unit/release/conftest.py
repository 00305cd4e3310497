"""What all tests of releases share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.releases import CONFIG, make_parts, release, train
from helpers.train_command import run_command

__all__ = ["run_command"]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders and an image."""
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """A release of a FlashI2V model; its run lies beside it."""
    root = tmp_path_factory.mktemp("flashi2v")
    train(root / "run", CONFIG)
    return release(root, parts, "--license", "apache-2.0", "--base-model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
