"""Shared set-up of all tests: the helpers' folder on the path, and one thread per process."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Mend what a test printed: xdist's workers send reports as UTF-8, which has no lone surrogates."""
    report = yield
    report.sections = [(name, text.encode(errors="replace").decode()) for name, text in report.sections]
    return report
