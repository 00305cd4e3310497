"""gloo for an accelerator's tensors: collectives copy them through host memory.

Slow, but independent of the vendor's network library: it separates faults of HCCL or NCCL from the job's, and runs
without them. gloo itself takes no NPU tensors, and CUDA tensors in only part of its collectives.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.distributed import Work

_DISPATCH_KEYS = {"cuda": "CUDA", "npu": "PrivateUse1"}
# torch's collectives that write their first argument ...
_WRITING = (
    "_allgather_base_", "_reduce_scatter_base_", "allgather_", "allgather_coalesced_",
    "allgather_into_tensor_coalesced_", "allreduce_", "allreduce_coalesced_", "alltoall_", "alltoall_base_",
    "broadcast_", "gather_", "recv_", "recv_any_source_", "reduce_", "reduce_scatter_",
    "reduce_scatter_tensor_coalesced_", "scatter_",
)  # fmt: skip
# ... and those that write nothing.
_READING = ("barrier", "send")


@functools.cache
def stage_through_host(device_type: str) -> torch.library.Library:
    """Make torch's collectives on tensors of this device type copy them to the host, run there, and copy back.

    Holds for the whole process. A result is on the device after its work's ``wait``, as with other backends.
    """
    library = torch.library.Library("c10d", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # replacing operators is intended
        for name in (*_WRITING, *_READING):
            collective = functools.partial(_staged, getattr(torch.ops.c10d, name), device_type, name in _WRITING)
            library.impl(name, collective, _DISPATCH_KEYS[device_type])
    served = torch.distributed.Backend.backend_capability["gloo"]
    if device_type not in served:  # by itself, gloo claims the CPU and CUDA
        served.append(device_type)
    return library


class _CopyBack(Work):
    """A collective's handle; waiting for it copies the results to the device."""

    # torch keeps only the handle's C++ part alive; without the Python part the work would never end.
    _unfinished: ClassVar[set[_CopyBack]] = set()

    def __init__(self, work: Work, results: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self._work, self._results = work, results
        self._unfinished.add(self)

    def wait(self, *timeout: Any) -> bool:
        """Wait, then copy once."""
        done = self._work.wait(*timeout)
        with torch.no_grad():
            while self._results:
                on_device, on_host = self._results.pop()
                on_device.copy_(on_host)
        self._unfinished.discard(self)
        return done


def _staged(collective: Callable[..., Any], device_type: str, writes: bool, *args: Any) -> Any:
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_host(value: Any, is_result: bool) -> Any:
        if isinstance(value, (list, tuple)):
            return [to_host(item, is_result) for item in value]
        if not isinstance(value, torch.Tensor) or value.device.type != device_type:
            return value
        on_host = value.detach().cpu()  # results too: gather and scatter write them on some ranks only
        if is_result:
            results.append((value.detach(), on_host))
        return on_host

    returned = collective(*(to_host(value, writes and place == 0) for place, value in enumerate(args)))
    handle = returned[-1] if isinstance(returned, tuple) else returned
    work = _CopyBack(Work.unbox(handle), results).boxed()
    return (args[0], work) if isinstance(returned, tuple) else work
