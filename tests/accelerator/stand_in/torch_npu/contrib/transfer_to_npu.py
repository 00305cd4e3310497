"""Does, when it is imported, what torch_npu's module of this name does to a process, as far as our runtime meets it.

``torch.cuda`` keeps its identity and gets ``torch.npu``'s functions; devices called cuda, and numbers, mean the NPU to
factories and to ``.to``; tensors of the NPU say that they are CUDA's.
Source: https://gitcode.com/Ascend/pytorch/blob/v2.7.1/torch_npu/contrib/transfer_to_npu.py
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
from torch.utils._device import _device_constructors

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "frombuffer", "full", "full_like", "linspace",
    "load", "normal", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor",
    "zeros", "zeros_like",
)  # fmt: skip


def _renamed(device: Any, *, numbers: bool = True) -> Any:
    """The NPU in place of a CUDA device, which a string, a ``torch.device`` or a number may name."""
    if isinstance(device, str):
        return device.replace("cuda", "npu")
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("npu" if device.index is None else f"npu:{device.index}")
    return f"npu:{device}" if numbers and type(device) is int else device


def _renaming(function: Callable[..., Any]) -> Callable[..., Any]:
    moves = function.__name__ == "to"

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_renamed(value, numbers=moves) for value in args)
        for name in ("device", "map_location"):
            if kwargs.get(name) is not None:
                kwargs[name] = _renamed(kwargs[name])
        return function(*args, **kwargs)

    return renamed


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, _renamed(device))


def _hccl(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        args = tuple(value.replace("nccl", "hccl") if isinstance(value, str) else value for value in args)
        return function(*args, **kwargs)

    return renamed


def _transfer() -> None:
    _device_constructors()  # contexts such as torch.device("meta") remember torch's functions as they are
    npu: Any = torch.npu  # type: ignore[attr-defined]
    for name, value in vars(npu).items():
        if not name.startswith("_") and not isinstance(value, SimpleNamespace):  # not its settings
            setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, getattr(npu, name))
    taking_devices = {torch: _FACTORIES, torch.Tensor: ("to", "new_empty", "new_zeros"), torch.nn.Module: ("to",)}
    for owner, names in taking_devices.items():
        for name in names:
            setattr(owner, name, _renaming(getattr(owner, name)))
    torch.Tensor.cuda, torch.nn.Module.cuda = torch.Tensor.npu, torch.nn.Module.npu
    torch.Tensor.is_cuda = torch.Tensor.is_npu
    torch.Generator = _Generator
    torch.distributed.init_process_group = _hccl(torch.distributed.init_process_group)
    torch.jit.script = lambda code, *_, **__: code
    warnings.warn("torch.cuda and devices called cuda now mean the NPU; torch.jit.script does nothing", stacklevel=2)


_transfer()
