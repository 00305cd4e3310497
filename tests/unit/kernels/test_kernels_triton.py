"""Triton without a GPU: the kernel tests in its interpreter, and every kernel compiled for real cards.

Both need a process of their own, in which Triton is imported with the right environment.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed; the extra 'test' brings it"
    ),
]


def run(command: list[str], **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    command = [sys.executable, *command]
    done = subprocess.run(
        command, env={**kept, **environment}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_against_the_references_in_the_interpreter() -> None:
    """The files' tests with ``triton`` as the only implementation."""
    files = [str(HERE / f"test_kernels_{name}.py") for name in ("modulation", "qk_norm_rope")]
    options = ["-q", "-k", "triton", "-p", "no:cacheprovider", "--timeout", "900"]
    # the interpreter computes on CPUs, wherever the other tests run
    told = run(["-m", "pytest", *options, *files], TRITON_INTERPRET="1", FLASHI2V_TEST_DEVICE="cpu")
    passed = int(told.rpartition(" passed")[0].split()[-1])
    assert passed > 90, told


@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.long), "90"])
def test_compiles_ahead_of_time(capability: str, tmp_path: Path) -> None:
    """Every kernel in bf16 and fp32, in each of its variants, at the widths of 1.3B and 14B, down to machine code."""
    told = run([str(HERE.parents[1] / "helpers" / "compile_triton.py"), capability], TRITON_CACHE_DIR=str(tmp_path))
    lines = told.splitlines()
    assert len(lines) == len(set(lines)) > 20
    assert {line.split()[0] for line in lines} == {
        "norm_forward", "norm_backward", "gate_forward", "gate_backward", "gelu_forward", "gelu_backward",
        "turn_forward", "turn_backward", "residual_norm_forward", "residual_norm_backward",
    }
