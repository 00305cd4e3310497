"""The one place that redirects megatron-core's literal "cuda" to the device in use.

megatron-core writes ``torch.cuda.current_device()``, ``device="cuda"``, ``tensor.cuda()`` and compares
``tensor.type()`` with ``"torch.cuda.FloatTensor"``. Inside :func:`megatron_on` these reach the NPU or the
CPU.

It exchanges the functions themselves instead of intercepting them by a ``TorchFunctionMode``: torch switches such a
mode off in ``torch.autograd.backward``, hence in every backward pass, hook and recomputation, and the mode costs a
Python call for each tensor operation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_flashi2v.runtime.device import Device

# Functions that take a device keyword and that megatron-core calls, or may call, with "cuda".
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randint",
    "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_MISSING = object()


@contextlib.contextmanager
def megatron_on(device: Device) -> Iterator[None]:
    """Make megatron-core run on ``device``: changes nothing on CUDA, redirects on NPU and CPU.

    Enter it before the first call into megatron-core and leave it after the last; leaving restores everything. Inside,
    ``torch.cuda.is_available()`` returns False, and ``torch.cuda.current_device()`` an index, as on CUDA: Megatron-FSDP
    makes a device name of it. A number as ``device=`` means the device, too.
    """
    if device.name == "cuda":
        yield
        return
    # Both cache torch's functions at their first call: call them before exchanging any function. Leaving clears the
    # compiler's table, since init_process_group empties it, maybe inside.
    compiler_rules = importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map
    compiler_rules()
    _device_constructors()
    with contextlib.ExitStack() as undo:
        undo.callback(compiler_rules.cache_clear)
        for owner, name, value in _exchanges(device):
            undo.callback(_put_back, owner, name, vars(owner).get(name, _MISSING))
            setattr(owner, name, value)
        yield


def _put_back(owner: Any, name: str, value: Any) -> None:
    if value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _exchanges(device: Device) -> Iterator[tuple[Any, str, Any]]:
    """Yield (module or class, attribute, stand-in) for every redirected function."""
    functions = _cuda_functions(device)
    for name, value in functions.items():
        yield torch.cuda, name, value
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        yield torch.cuda.random, name, functions[name]  # the RNG tracker reaches into the submodule
    yield torch.cuda.nvtx, "range_push", lambda *_, **__: None
    yield torch.cuda.nvtx, "range_pop", lambda *_, **__: None
    for name in _FACTORIES:
        yield torch, name, _redirect_factory(getattr(torch, name), device.torch_device)
    yield torch.Tensor, "to", _redirect_to(torch.Tensor.to, device.torch_device)
    yield torch.Tensor, "cuda", _redirect_cuda(device.torch_device)
    yield torch.nn.Module, "cuda", _redirect_module_cuda(device.torch_device)
    yield torch.Tensor, "type", _redirect_type(torch.Tensor.type, device)
    yield torch.distributed, "new_group", _redirect_new_group(torch.distributed.new_group, device)


def _cuda_functions(device: Device) -> dict[str, Any]:
    """Stand-ins for the functions that megatron-core calls on ``torch.cuda``, by name.

    Each is a separate object: the compiler's table refuses one object under two names.
    """
    functions: dict[str, Any] = {
        "is_available": lambda: False,
        # megatron-core defers its RNG calls until CUDA is initialised (torch.cuda._lazy_call).
        "is_initialized": lambda: True,
        "current_device": lambda: device.torch_device.index or 0,
        "set_device": lambda *_, **__: None,  # resolve_device has chosen it
        "synchronize": lambda *_, **__: device.synchronize(),
        "empty_cache": lambda: device.empty_cache(),
        "memory_allocated": lambda *_, **__: device.memory_allocated(),
        "max_memory_allocated": lambda *_, **__: device.max_memory_allocated(),
        "memory_reserved": lambda *_, **__: device.memory_allocated(),
        "max_memory_reserved": lambda *_, **__: device.max_memory_allocated(),
        "reset_peak_memory_stats": lambda *_, **__: device.reset_max_memory_allocated(),
        "memory_stats": lambda *_, **__: {},
        "get_device_capability": lambda *_, **__: (0, 0),  # lower than any that switches a feature on
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_, **__: device.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: device.set_rng_state(state),
        "manual_seed": lambda seed: device.manual_seed(seed),
        "manual_seed_all": lambda seed: device.manual_seed(seed),
    }
    if device.name == "npu":
        api = torch.npu  # type: ignore[attr-defined]
        for name in ("Stream", "Event", "stream", "current_stream", "default_stream", "memory_reserved",
                     "max_memory_reserved", "memory_stats"):  # fmt: skip
            functions[name] = getattr(api, name)
        functions["default_generators"] = _OneGenerator(api.default_generators[device.torch_device.index])
    else:
        functions["Stream"] = HostStream
        functions["Event"] = HostEvent
        functions["stream"] = contextlib.nullcontext
        functions["current_stream"] = lambda *_, **__: HostStream()
        functions["default_stream"] = lambda *_, **__: HostStream()
        functions["default_generators"] = _OneGenerator(torch.default_generator)
    return functions


class HostEvent:
    """A ``torch.cuda.Event`` of the CPU, where a call returns when its work is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def record(self, stream: Any = None) -> None:
        """Nothing is queued."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True


class HostStream:
    """A ``torch.cuda.Stream`` of the CPU, where work runs in the order of the calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> Any:
        """Return an event that is over."""
        return HostEvent() if event is None else event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always idle."""
        return True


class _OneGenerator:
    """``torch.cuda.default_generators`` of a process with one device; the index may be a ``torch.device``."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __getitem__(self, index: Any) -> torch.Generator:
        return self._generator

    def __len__(self) -> int:
        return 1


def _is_cuda(device: Any) -> bool:
    """Whether a ``device`` argument names CUDA."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _redirect_factory(factory: Callable[..., Any], target: torch.device) -> Callable[..., Any]:
    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = target
        return factory(*args, **kwargs)

    return redirected


def _redirect_to(to: Callable[..., Any], target: torch.device) -> Callable[..., Any]:
    @functools.wraps(to)
    def redirected(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Most calls give a dtype alone, thousands in each pass of a small model: they are passed on first.
        if args and type(args[0]) is not torch.dtype and _is_cuda(args[0]):
            args = (target, *args[1:])
        elif "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = target
        return to(self, *args, **kwargs)

    return redirected


def _redirect_cuda(target: torch.device) -> Callable[..., Any]:
    def cuda(
        self: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        return self.to(target, non_blocking=non_blocking, **kwargs)

    return cuda


def _redirect_module_cuda(target: torch.device) -> Callable[..., Any]:
    def cuda(self: torch.nn.Module, device: Any = None) -> torch.nn.Module:
        return self.to(target)

    return cuda


def _redirect_new_group(new_group: Callable[..., Any], device: Device) -> Callable[..., Any]:
    """Give groups the device's options; megatron-core has options for NCCL's groups alone."""

    @functools.wraps(new_group)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") is None and kwargs.get("pg_options") is None:
            kwargs["pg_options"] = device.group_options(kwargs.get("group_desc"))
        return new_group(*args, **kwargs)

    return redirected


def _redirect_type(type_: Callable[..., Any], device: Device) -> Callable[..., Any]:
    """Make ``tensor.type()`` return "torch.cuda.FloatTensor" for the device's tensors, and cast by such names to it."""
    own = "torch." if device.name == "cpu" else f"torch.{device.name}."
    cuda = "torch.cuda."

    @functools.wraps(type_)
    def redirected(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = type_(self)
            # MindSpeed's replacement says "torch.cuda." of itself
            return cuda + name[len(own) :] if self.device.type == device.name and not name.startswith(cuda) else name
        if isinstance(dtype, str) and dtype.startswith(cuda):
            dtype = own + dtype[len(cuda) :]
        return type_(self, dtype, *args, **kwargs)

    return redirected
