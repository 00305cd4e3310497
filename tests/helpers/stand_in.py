"""The stand-in for torch_npu in this process, and the environment that gives it to a subprocess."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "accelerator" / "stand_in"
_loaded: dict[str, ModuleType] = {}  # its operators can be registered once in a process


def _is_ours(name: str) -> bool:
    return name == "torch_npu" or name.startswith("torch_npu.")


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in as ``torch_npu``, for one test; afterwards the package is not installed again."""
    if "torch_npu" in sys.modules:
        pytest.skip("the real torch_npu is installed; tests/accelerator/real_torch_npu.sh uses it")
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.update(_loaded)
    module = importlib.import_module("torch_npu")
    _loaded.update({name: sys.modules[name] for name in list(sys.modules) if _is_ours(name)})
    yield module
    for name in _loaded:
        del sys.modules[name]


def emulated_npus(count: int) -> dict[str, str]:
    """The environment of a process that finds ``count`` emulated NPUs."""
    paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "EMULATED_NPUS": str(count)}
