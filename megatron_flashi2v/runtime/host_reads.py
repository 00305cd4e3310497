"""Reads of the device by the host: each waits until the device has done all that was queued before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_flashi2v.runtime.device import Device

aten = torch.ops.aten
OPERATORS = frozenset((
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
))  # fmt: skip
"""Operators that bring numbers, or a size that depends on them, to the host; ``item`` and ``bool`` call the first."""
CALLS = frozenset((Tensor.tolist, Tensor.numpy, Tensor.cpu))
"""Calls that do likewise, and no operator on CPUs."""


class HostReads:
    """Counts reads of a device by the host, and refuses those beyond a number.

    Where there is a number, torch itself refuses every operation on CUDA that waits, whatever calls it. Otherwise
    :data:`OPERATORS` are seen, in the backward pass too, and :data:`CALLS` outside of it.

    Args:
        device: whose tensors are watched; on CPUs every tensor is.
        allowed: reads that pass; None for all.

    Attributes:
        count: reads so far.

    Raises:
        RuntimeError: where the first read beyond the number happens.
    """

    def __init__(self, device: Device, allowed: int | None) -> None:
        self.device, self.allowed, self.count = device, allowed, 0
        self._entered = ExitStack()

    def __enter__(self) -> HostReads:
        mode: Literal["default", "error"] = "default" if self.allowed is None else "error"
        for watch in (_waits(self.device, mode), _Calls(self), _Operators(self)):
            self._entered.enter_context(watch)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def judge(self, name: str, tensor: Tensor, call: Callable[[], Any]) -> Any:
        """Make a call that reads ``tensor``, unless it is one too many."""
        if tensor.device != self.device.torch_device:
            return call()
        self.count += 1
        if self.allowed is not None and self.count > self.allowed:
            raise RuntimeError(f"the host reads {self.device.torch_device} by {name}: read {self.count}")
        with _waits(self.device, "default"):
            return call()


class _Calls(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(function, *args, **(kwargs or {}))
        return self.reads.judge(function.__name__, args[0], call) if function in CALLS else call()


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(function, *args, **(kwargs or {}))
        operator = function.overloadpacket
        return self.reads.judge(operator.__name__, args[0], call) if operator in OPERATORS else call()


@contextmanager
def _waits(device: Device, mode: Literal["default", "error"]) -> Iterator[None]:
    """Let CUDA's operations that wait pass, or fail."""
    if device.name != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
