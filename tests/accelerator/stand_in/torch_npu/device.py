"""Devices ``npu:0`` ... on the CPU: torch's PrivateUse1 with a Python fallback that computes on the host's memory.

A tensor on an emulated NPU and its twin on the CPU share their bytes, by way of DLPack, whose capsules differ in the
device alone. So views, in-place operators and ``.data`` behave as on a device of its own. Threads must choose their
device, as on the real one; all tensors are on ``npu:0``, because torch counts one device of a backend in Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_DLPACK_CPU, _DLPACK_EXTENSION = 1, 12
_NAME = "Ascend910B3"
_MEMORY = 64 * 1024**3

pinned_by: list[int] = []
"""Device of the thread that pinned memory, for each time."""
reads: list[str] = []
"""For each time that the host took values from the device, for which it waits: the innermost caller outside torch, as
path:line."""

_current = threading.local()
_address_of = ctypes.pythonapi.PyCapsule_GetPointer
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_libraries: list[torch.library.Library] = []


def install(count: int) -> None:
    """Make ``count`` devices called npu, and ``torch.npu``."""
    guard_base, hooks_base = torch._C._acc.DeviceGuard, torch._C._acc.PrivateUse1Hooks

    class Guard(guard_base):  # type: ignore[misc, valid-type]
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    class Hooks(hooks_base):  # type: ignore[misc, valid-type]
        def is_available(self) -> bool:
            return True

        def is_built(self) -> bool:
            return True

        def has_primary_context(self, _: int) -> bool:
            return True

    _setup_privateuseone_for_python_backend("npu", backend_module=_module(count), hook=Hooks(), device_guard=Guard())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run_on_host, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("convolution_overrideable", _convolution, "PrivateUse1")
    aten.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    aten.impl("_pin_memory", _pin_memory, "CPU")
    _libraries.extend((library, aten))


def _twin(tensor: Tensor, kind: int) -> Tensor:
    """The same bytes as a tensor of the CPU, or of the emulated NPU."""
    capsule = torch._C._to_dlpack(tensor)  # type: ignore[attr-defined]
    # struct DLTensor { void* data; struct { int32 device_type; int32 device_id; } device; ... }
    ctypes.c_int32.from_address(_address_of(capsule, b"dltensor") + 8).value = kind
    return torch._C._from_dlpack(capsule)


def _require_chosen_device() -> None:
    """ACL's context belongs to a thread: one that chooses no device makes a context on device 0, whosever that is.

    Raises:
        RuntimeError: in such a thread. Threads that torch itself has started, for backward, choose by themselves.
    """
    own = not isinstance(threading.current_thread(), threading._DummyThread)  # type: ignore[attr-defined]
    if own and getattr(_current, "index", None) is None:
        raise RuntimeError(f"the thread {threading.current_thread().name!r} uses an NPU and has chosen none")


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    _require_chosen_device()
    pinned_by.append(_current.index)
    return tensor.clone()


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Over nested tuples, lists and dictionaries."""
    if isinstance(value, (tuple, list)):
        return type(value)([_map(function, item) for item in value])
    if isinstance(value, dict):
        return {name: _map(function, item) for name, item in value.items()}
    return function(value)


def _is_npu(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == "npu"


def _note_read() -> None:
    callers = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    inner = [frame for frame in callers if "/torch/" not in frame.filename] or callers
    reads.append(f"{inner[-1].filename}:{inner[-1].lineno}")


def _run_on_host(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the twins of its tensors, and give its results back as tensors of the NPU."""
    originals: dict[int, Tensor] = {}
    twins: list[Tensor] = []  # alive while their ids are keys
    devices: list[torch.device] = []

    def enter(value: Any) -> Any:
        if _is_npu(value):
            devices.append(value)
            return torch.device("cpu")
        if not isinstance(value, Tensor) or value.device.type != "npu":
            return value
        devices.append(value.device)
        # operators give an empty output its size, which memory that is shared cannot change
        twin = _twin(value, _DLPACK_CPU) if value.numel() else torch.empty(value.shape, dtype=value.dtype)
        originals[id(twin)] = value
        twins.append(twin)
        return twin

    def leave(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_complex():
            raise RuntimeError(f"{operator} gives complex numbers, which NPUs lack in part of their operators")
        if id(value) in originals:  # an in-place operator returns what it was given
            original = originals[id(value)]
            if original.shape != value.shape:
                original.data = _twin(value, _DLPACK_EXTENSION)
            return original
        return _twin(value, _DLPACK_EXTENSION)

    _require_chosen_device()
    host_args, host_kwargs = list(_map(enter, args)), _map(enter, kwargs)
    for place, (argument, value) in enumerate(zip(operator._schema.arguments, host_args, strict=False)):
        if isinstance(value, (int, float)) and isinstance(argument.type, torch.TensorType):
            # torch hands a tensor that stands for a number over as the number
            host_args[place] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if operator is torch.ops.aten._local_scalar_dense.default:
        _note_read()
    if operator is torch.ops.aten._copy_from.default:  # copy_ between devices
        source, target = host_args[:2]
        if args[1].device.type == "cpu":
            _note_read()
        target.copy_(source)
        return args[1]
    # a conversion to the CPU stays there
    if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type == "cpu":
        _note_read()
        return operator(*host_args, **{**host_kwargs, "copy": True} if "copy" in kwargs else host_kwargs)
    if getattr(_current, "operator", None) is not None:
        raise RuntimeError(f"{operator} ran on the emulated NPU inside {_current.operator}")
    _current.operator = operator
    try:
        return _map(leave, operator(*host_args, **host_kwargs))
    finally:
        _current.operator = None


def _convolution(*args: Any) -> Any:
    return _run_on_host(torch.ops.aten.convolution.default, *args)


def _convolution_backward(grad: Tensor, inputs: Tensor, weight: Tensor, *args: Any) -> Any:
    sizes = [weight.shape[1] * args[-2] if args[3] else weight.shape[0]]  # transposed ones swap the channels
    return _run_on_host(torch.ops.aten.convolution_backward.default, grad, inputs, weight, sizes, *args)


class _Event:
    """Work is done when its call returns."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        del blocking, interprocess
        self._timed = enable_timing
        self._recorded: float | None = None

    def record(self, stream: Any = None) -> None:
        """Nothing is queued."""
        self._recorded = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end_event: _Event) -> float:
        """Milliseconds between two recorded events, both made for it."""
        if not (self._timed and end_event._timed) or self._recorded is None or end_event._recorded is None:
            raise RuntimeError("both events must be made with enable_timing=True, and recorded")
        return 1e3 * (end_event._recorded - self._recorded)

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always over."""
        return True


class _Stream:
    """Work runs in the order of the calls."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        del device, priority

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    wait_event = wait_stream

    def record_event(self, event: _Event | None = None) -> _Event:
        """An event that is already over."""
        return event or _Event()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always idle."""
        return True


def _module(count: int) -> ModuleType:
    """``torch.npu``: what torch_npu mirrors of torch.cuda, as far as it is called."""
    module = ModuleType("torch.npu")
    generators = [torch.Generator() for _ in range(count)]

    def index_of(device: Any = None) -> int:
        if device is None:
            return getattr(_current, "index", 0)
        index = device if isinstance(device, int) else torch.device(device).index
        index = getattr(_current, "index", 0) if index is None else index
        if not 0 <= index < count:
            raise RuntimeError(f"npu:{index} does not exist; there are {count}")
        return index

    def set_device(device: Any) -> None:
        _current.index = index_of(device)

    def manual_seed_all(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    functions = {
        "is_available": lambda: count > 0, "is_initialized": lambda: True, "_is_in_bad_fork": lambda: False,
        "device_count": lambda: count, "current_device": index_of, "set_device": set_device,
        "synchronize": lambda device=None: None, "empty_cache": lambda: None,
        "get_device_name": lambda device=None: _NAME, "is_bf16_supported": lambda: True,
        "get_device_properties": lambda device=None: SimpleNamespace(name=_NAME, total_memory=_MEMORY),
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0, "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None, "memory_stats": lambda device=None: {},
        "manual_seed": lambda seed: generators[index_of()].manual_seed(seed), "manual_seed_all": manual_seed_all,
        "get_rng_state": lambda device="npu": generators[index_of(device)].get_state(),
        "set_rng_state": lambda state, device="npu": generators[index_of(device)].set_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "current_stream": lambda device=None: _Stream(), "default_stream": lambda device=None: _Stream(),
        "stream": stream, "Stream": _Stream, "Event": _Event, "default_generators": tuple(generators),
        # as they are on the device until somebody sets them
        "config": SimpleNamespace(allow_internal_format=True), "matmul": SimpleNamespace(allow_hf32=False),
        "conv": SimpleNamespace(allow_hf32=True),
    }
    vars(module).update(functions)
    return module
