"""The device of this process: CUDA, an Ascend NPU or the CPU behind one small interface.

Only this package calls ``torch.cuda`` and ``torch.npu``.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.profiler

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.hccl import OTHERS

DEVICE_NAMES = ("auto", "cuda", "npu", "cpu")
_WITHOUT = "use --device cpu or --device auto to run without it"
_GIB = 1024**3

logger = logging.getLogger(__name__)


class Device(abc.ABC):
    """One process's device. Memory figures are bytes.

    Attributes:
        name: "cuda", "npu" or "cpu".
        runs_torchscript: whether programs that others traced, for CUDA and the CPU, run on it.
        backend: torch.distributed's backend: the device's own ("nccl", "hccl" or "gloo"), or gloo by choice.
        torch_device: the device of tensors, with the index of an accelerator.
    """

    name: str
    runs_torchscript: bool = True
    backend: str

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""

    @abc.abstractmethod
    def time_mark(self) -> Any:
        """Put a mark into the device's queue of work, for :meth:`seconds_between`."""

    @abc.abstractmethod
    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to a later one; the device must have passed both."""

    @abc.abstractmethod
    def memory_allocated(self) -> int:
        """Bytes that tensors hold on an accelerator; on the CPU the process's resident set."""

    @abc.abstractmethod
    def max_memory_allocated(self) -> int:
        """The peak of :meth:`memory_allocated`; on the CPU since the process began."""

    @abc.abstractmethod
    def reset_max_memory_allocated(self) -> None:
        """Reset the peak; the CPU's cannot be reset."""

    @abc.abstractmethod
    def total_memory(self) -> int:
        """Bytes of the device's memory."""

    @abc.abstractmethod
    def empty_cache(self) -> None:
        """Return cached, unused blocks to the driver."""

    @abc.abstractmethod
    def manual_seed(self, seed: int) -> None:
        """Seed the host's and the device's default generators."""

    @abc.abstractmethod
    def get_rng_state(self) -> torch.Tensor:
        """The state of the device's default generator: a uint8 tensor on the host."""

    @abc.abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore a state that :meth:`get_rng_state` returned."""

    @abc.abstractmethod
    def compute_capability(self) -> tuple[int, int] | None:
        """CUDA's (major, minor); None on other devices."""

    @abc.abstractmethod
    def model_name(self) -> str:
        """The hardware's name, such as "NVIDIA H100 80GB HBM3"."""

    def group_options(self, description: str | None) -> Any:
        """Options of a process group, by torch's or megatron-core's description; None for the backend's defaults."""
        return None

    def profiler(self) -> Any:
        """A profiler of host and device, not started: ``start``, ``step``, ``stop``, ``export_chrome_trace(path)``."""
        return torch.profiler.profile(activities=list(torch.profiler.supported_activities()))

    def describe(self) -> str:
        """One line for the start-up report."""
        capability = self.compute_capability()
        compute = f", compute capability {capability[0]}.{capability[1]}" if capability else ""
        return (
            f"{self.torch_device}: {self.model_name()}, {self.total_memory() / _GIB:.0f} GiB{compute}, "
            f"{self.backend}, torch {torch.__version__}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.torch_device})"


class CpuDevice(Device):
    """The host, for development and tests."""

    name = "cpu"
    backend = "gloo"

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def synchronize(self) -> None:
        """Nothing is queued on the CPU."""

    def time_mark(self) -> float:
        return time.perf_counter()

    def seconds_between(self, first: float, second: float) -> float:
        return second - first

    def memory_allocated(self) -> int:
        return psutil.Process().memory_info().rss

    def max_memory_allocated(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
        return max(peak, self.memory_allocated())  # the kernel's peak lags behind

    def reset_max_memory_allocated(self) -> None:
        """The operating system keeps the peak for the life of the process."""

    def total_memory(self) -> int:
        return psutil.virtual_memory().total

    def empty_cache(self) -> None:
        """The CPU allocator keeps no cache."""

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_rng_state(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.default_generator.set_state(state)

    def compute_capability(self) -> tuple[int, int] | None:
        return None

    def model_name(self) -> str:
        return f"{platform.machine()} CPU with {torch.get_num_threads()} threads"


class _Accelerator(Device):
    """The common part of CUDA and NPU: torch_npu mirrors torch.cuda's functions under torch.npu."""

    def __init__(self, api: Any, index: int) -> None:
        super().__init__(torch.device(self.name, index))
        self.api = api
        api.set_device(self.torch_device)

    def synchronize(self) -> None:
        self.api.synchronize(self.torch_device)

    def time_mark(self) -> Any:
        event = self.api.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1e3

    def memory_allocated(self) -> int:
        return self.api.memory_allocated(self.torch_device)

    def max_memory_allocated(self) -> int:
        return self.api.max_memory_allocated(self.torch_device)

    def reset_max_memory_allocated(self) -> None:
        self.api.reset_peak_memory_stats(self.torch_device)

    def total_memory(self) -> int:
        return self.api.get_device_properties(self.torch_device).total_memory

    def empty_cache(self) -> None:
        self.api.empty_cache()

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        self.api.manual_seed(seed)

    def get_rng_state(self) -> torch.Tensor:
        return self.api.get_rng_state(self.torch_device)

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.api.set_rng_state(state, self.torch_device)

    def model_name(self) -> str:
        return self.api.get_device_name(self.torch_device)


class CudaDevice(_Accelerator):
    """One NVIDIA GPU, made the process's current one."""

    name = "cuda"
    backend = "nccl"

    def __init__(self, index: int) -> None:
        super().__init__(torch.cuda, index)
        # The VAE and FlashI2V's phi stay fp32: cuDNN would round their convolutions to TF32.
        torch.backends.cudnn.allow_tf32 = False

    def compute_capability(self) -> tuple[int, int] | None:
        return torch.cuda.get_device_capability(self.torch_device)


class NpuDevice(_Accelerator):
    """One Ascend NPU, made the process's current one.

    Args:
        index: number of the card.
        hccl_buffer_sizes: MB by a group's description, as ``config.hccl.parse_buffer_sizes`` returns them.
    """

    name = "npu"
    runs_torchscript = False
    backend = "hccl"

    def __init__(self, index: int, hccl_buffer_sizes: Mapping[str, int] | None = None) -> None:
        super().__init__(_npu_api(), index)
        self.hccl_buffer_sizes = dict(hccl_buffer_sizes or {})
        # Private tensor formats copy and pad around Conv3d (phi, patches, the VAE).
        self.api.config.allow_internal_format = False
        # The VAE, phi and the high-pass stay fp32: HF32 keeps 11 of the mantissa's 23 bits.
        self.api.conv.allow_hf32 = False
        self.api.matmul.allow_hf32 = False

    def compute_capability(self) -> tuple[int, int] | None:
        return None

    def group_options(self, description: str | None) -> Any:
        size = self.hccl_buffer_sizes.get(description or OTHERS, self.hccl_buffer_sizes.get(OTHERS))
        if self.backend != "hccl" or size is None:
            return None
        options = sys.modules["torch_npu"]._C._distributed_c10d.ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": size}
        return options

    def profiler(self) -> Any:
        # https://www.hiascend.com/document/detail/zh/Pytorch/600/apiref/apilist/ptaoplist_000992.html
        api = sys.modules["torch_npu"].profiler
        return api.profile(activities=[api.ProfilerActivity.CPU, api.ProfilerActivity.NPU])

    def describe(self) -> str:
        return f"{super().describe()}, torch_npu {sys.modules['torch_npu'].__version__}"


def resolve_device(
    name: str, local_rank: int = 0, *, backend: str = "auto", hccl_buffer_sizes: Mapping[str, int] | None = None
) -> Device:
    """Choose the device by name and make it this process's current one.

    Args:
        name: "cuda", "npu", "cpu", or "auto" for the first of these that is available.
        local_rank: the process's number on its host, and its accelerator's.
        backend: "auto" for the device's own collectives, or "gloo".
        hccl_buffer_sizes: for :class:`NpuDevice`.

    Raises:
        ConfigError: the name is unknown, the device is not available (the message says what is missing), or the host
            has fewer accelerators than processes.
    """
    if name not in DEVICE_NAMES:
        raise ConfigError(f"device is {name!r}; choose one of {', '.join(DEVICE_NAMES)}")
    device = _find_device(name, local_rank, hccl_buffer_sizes)
    if backend != "auto":
        device.backend = backend
    return device


def bind_thread(device: torch.device) -> None:
    """Make a device the calling thread's current one; call it first in a thread that may use the device.

    In CUDA and in ACL every thread has its own current device, which is number 0 in a new thread. Pinning memory or
    encoding there would make a context on the card of local rank 0.
    """
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)


def _find_device(name: str, local_rank: int, hccl_buffer_sizes: Mapping[str, int] | None) -> Device:
    if name == "cpu":
        return CpuDevice()
    if name in ("auto", "cuda"):
        missing = _missing_cuda()
        if missing is None:
            return CudaDevice(_card(torch.cuda.device_count(), local_rank, "GPU", "CUDA_VISIBLE_DEVICES"))
        if name == "cuda":
            raise ConfigError(f"device is 'cuda', but {missing}; {_WITHOUT}")
    missing = _missing_npu()
    if missing is None:
        card = _card(_npu_api().device_count(), local_rank, "NPU", "ASCEND_RT_VISIBLE_DEVICES")
        return NpuDevice(card, hccl_buffer_sizes)
    if name == "npu":
        raise ConfigError(f"device is 'npu', but {missing}; {_WITHOUT}")
    if _has_torch_npu():
        logger.warning("torch_npu is installed but %s; running on the CPU", missing)
    return CpuDevice()


def _missing_cuda() -> str | None:
    """What keeps CUDA from running here; None if it can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA (install a CUDA build of torch)"
    return (
        f"no GPU can be used (torch is built for CUDA {torch.version.cuda}; look at nvidia-smi and "
        "CUDA_VISIBLE_DEVICES)"
    )


def _missing_npu() -> str | None:
    """What keeps the NPU from running here; None if it can. Imports torch_npu if it is installed."""
    if not _has_torch_npu():
        return "torch_npu is not installed (install the version that matches torch, and CANN)"
    try:
        importlib.import_module("torch_npu")
        available = _npu_api().is_available()
    except Exception as error:  # the import loads vendor libraries, which fail in many ways
        return f"torch_npu cannot be loaded ({type(error).__name__}: {error}); source CANN's set_env.sh first"
    return None if available else "no NPU can be used (look at npu-smi info and ASCEND_RT_VISIBLE_DEVICES)"


def _has_torch_npu() -> bool:
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


def _npu_api() -> ModuleType:
    """``torch.npu``, which torch_npu adds to torch."""
    return torch.npu  # type: ignore[attr-defined]


def _card(count: int, local_rank: int, kind: str, variable: str) -> int:
    """The accelerator for a local rank."""
    if local_rank < count:
        return local_rank
    if count == 1 and os.environ.get(variable):
        return 0  # the launcher (Slurm's --gpus-per-task) shows each process its own card only
    raise ConfigError(
        f"local rank {local_rank} has no {kind}: this host shows {count}; start at most {count} processes on "
        f"it ({variable} is {os.environ.get(variable, 'not set')})"
    )
