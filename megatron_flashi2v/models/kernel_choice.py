"""Tells which kernels were chosen: a line for each operator, or one line where there was nothing to choose."""

from __future__ import annotations

from collections.abc import Sequence

from flashi2v_kernels.registry import Kernel, describe


def default_kernels(chosen: Sequence[Kernel], device_type: str, attention_backend: str) -> str | None:
    """The line that stands for all kernels on a CPU, which has one implementation of each operator to prefer.

    Args:
        chosen: of each operator.
        device_type: "cuda", "npu" or "cpu".
        attention_backend: what was asked for.

    Returns:
        None where the kernels are worth a line each.
    """
    if device_type != "cpu" or attention_backend != "auto":
        return None
    attention = next(name for operator, name, _ in describe(chosen) if operator == "attention")
    return f"all {len(chosen)} kernels are the default ones of a CPU (attention: {attention})"
