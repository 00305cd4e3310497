"""MindSpeed, Ascend's adapter of megatron-core, used as a library: passes it settings, and logs what it replaced.

Its adaptor reads the command line when it is imported, and merges it into megatron-core's configurations. This module
shows it an empty command line, and passes settings one by one. MindSpeed puts empty modules in the place of
``transformer_engine`` and ``apex`` and changes ``importlib.metadata.version``, so that only
``importlib.metadata.distribution`` tells whether these are installed. It imports ``torch_npu.contrib.transfer_to_npu``,
which gives ``torch.cuda`` the NPU's functions; ``redirect.megatron_on`` exchanges them once more.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.layout import asked_sharding
from megatron_flashi2v.config.train import TrainConfig

_PACKAGE = "mindspeed"
_DUMMY_FILE = "mindspeed.dummy_module.py"
"""``__file__`` of its empty modules (mindspeed/patch_utils.py, branch core_r0.16.0)."""
_LOOKED_AT = ("torch", "megatron", "importlib")
_CURE = "install MindSpeed's branch core_r{minor}.0, or leave --use-mindspeed out: plain torch_npu works too"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replaced:
    """MindSpeed's changes.

    Attributes:
        functions: full names of functions, classes and methods of other packages that are now MindSpeed's.
        dummies: packages that have a module now without being installed.
    """

    functions: tuple[str, ...]
    dummies: tuple[str, ...]


def load_mindspeed(config: TrainConfig) -> Replaced:
    """Import MindSpeed's adaptor, pass it our settings, and log what it replaced.

    Call it before anything imports megatron-core, and after resolving the device, whose errors are plainer.

    Raises:
        ConfigError: MindSpeed is not installed, is made for another minor version of megatron-core, or cannot be
            loaded.
        RuntimeError: megatron-core is imported already.
    """
    version = check_version()
    loaded = [name for name in sys.modules if name.startswith("megatron.core")]
    if loaded:
        raise RuntimeError(f"MindSpeed must come before megatron-core, but {loaded[0]} is imported already")
    before = set(sys.modules)
    try:
        with _clean_command_line():
            adaptor = importlib.import_module("mindspeed.megatron_adaptor")
            adaptor.repatch(settings(config))
    except (Exception, SystemExit) as error:  # it replaces by name, and exits at a flag that it rejects
        raise ConfigError(
            f"--use-mindspeed: MindSpeed {version} cannot be loaded ({type(error).__name__}: {error}); "
            + _CURE.format(minor=_minor(importlib.metadata.version("megatron-core")))
        ) from error
    replaced = find_replaced(before)
    logger.info("MindSpeed %s replaced %d functions: %s", version, len(replaced.functions),
                ", ".join(replaced.functions) or "none")
    logger.info("MindSpeed put empty modules in place of: %s", ", ".join(replaced.dummies) or "none")
    return replaced


def check_version() -> str:
    """MindSpeed's version, after comparing its minor with megatron-core's.

    Raises:
        ConfigError: MindSpeed is not installed, or made for another minor of megatron-core.
    """
    core = importlib.metadata.version("megatron-core")
    cure = _CURE.format(minor=_minor(core))
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"--use-mindspeed: MindSpeed is not installed; {cure}") from None
    if _minor(version) != _minor(core):
        raise ConfigError(
            f"--use-mindspeed: MindSpeed {version} is made for megatron-core {_minor(version)}, but {core} is "
            f"installed; {cure}"
        )
    return version


def settings(config: TrainConfig) -> dict[str, Any]:
    """MindSpeed's settings, by the names of Megatron's arguments; it merges them into megatron-core's configurations.

    Only the settings that its replacements need, or that keep them off: attention and context parallelism are ours, so
    the context parallel size is always 1 here.
    """
    parallel = config.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        "use_distributed_optimizer": asked_sharding(parallel) == "optim",
        "context_parallel_size": 1,
        "transformer_impl": "local",
        "use_flash_attn": False,
        "gradient_accumulation_fusion": False,
        "bf16": config.batch.bf16,
    }


def find_replaced(before: set[str]) -> Replaced:
    """Search torch and megatron-core for MindSpeed's code.

    Args:
        before: names of the modules that were imported before it.
    """
    functions = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in _LOOKED_AT or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if _is_mindspeeds(value):
                functions.add(f"{name}.{attribute}")
            elif issubclass(type(value), type) and value.__module__ == name:
                functions |= {f"{name}.{attribute}.{method}" for method, code in list(vars(value).items())
                              if _is_mindspeeds(code)}  # fmt: skip
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    dummies = {name for name in new if name in sys.modules and _is_dummy(sys.modules[name])}
    # Others make modules without a file too: multiprocessing a second name of the main one, Cython its run time.
    dummies = {name for name in dummies if name != "__mp_main__" and not name.startswith(("_cython_", "cython_"))}
    return Replaced(tuple(sorted(functions)), tuple(sorted(dummies)))


def _is_dummy(module: ModuleType) -> bool:
    """Whether a module has no source; its file tells, since its specification may look like a namespace's."""
    return getattr(module, "__file__", None) == _DUMMY_FILE or getattr(module, "__spec__", None) is None


def _is_mindspeeds(value: Any) -> bool:
    kind = type(value)  # isinstance would call the object's code, and some of torch's objects warn or start CUDA then
    if issubclass(kind, type):
        return value.__module__.partition(".")[0] == _PACKAGE
    if kind in (staticmethod, classmethod):
        value, kind = value.__func__, type(value.__func__)
    # Its wrappers have the names of what they wrap; only their globals tell where they were written.
    return kind is FunctionType and str(value.__globals__.get("__name__")).partition(".")[0] == _PACKAGE


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@contextlib.contextmanager
def _clean_command_line() -> Iterator[None]:
    saved = sys.argv
    sys.argv = saved[:1]
    try:
        yield
    finally:
        sys.argv = saved
