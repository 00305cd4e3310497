"""How the stand-in refuses what the operators' documentation does not allow."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def require(operator: str, condition: bool, reason: str) -> None:
    """Raise as the device would, naming the operator."""
    if not condition:
        raise RuntimeError(f"{operator}: {reason}")


def require_floats(operator: str, *tensors: Tensor) -> None:
    """The operators take no fp64."""
    for tensor in tensors:
        require(operator, tensor.dtype in FLOATS, f"{tensor.dtype} is not supported")
