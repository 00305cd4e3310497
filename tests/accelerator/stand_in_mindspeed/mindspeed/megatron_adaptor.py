"""Does, when it is imported, what MindSpeed's adaptor does to a process.

It reads the command line (even -h), keeps unknown values as strings, merges them into every TransformerConfig, makes
torch.compile do nothing, lets torch_npu turn torch.cuda into the NPU's, puts empty modules in place of
transformer_engine and apex, and wraps functions of torch, importlib and megatron-core.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch_npu.contrib import transfer_to_npu  # noqa: F401  (as MindSpeed does)


def _wrap(owner, name, wrapper):
    setattr(owner, name, wrapper(getattr(owner, name)))


def _read_command_line():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    known, unknown = parser.parse_known_args()
    for word in unknown:
        name, equals, value = word.removeprefix("--").partition("=")
        setattr(known, name.replace("-", "_"), value if equals else True)
    return known


ARGS = _read_command_line()


def _no_compile(model=None, **_):
    return model if model is not None else (lambda function: function)


torch.compile = _no_compile


def _version(version):
    @functools.wraps(version)
    def wrapper(name):
        return "0.0" if name.replace("_", "-") == "transformer-engine" else version(name)

    return wrapper


def _type(type_):
    @functools.wraps(type_)
    def wrapper(self, *args, **kwargs):
        found = type_(self, *args, **kwargs)
        return found.replace("npu", "cuda") if isinstance(found, str) else found

    return wrapper


_wrap(importlib.metadata, "version", _version)
_wrap(torch.Tensor, "type", _type)

# MindSpeed fills its modules with what megatron-core asks of them when it is imported. These stay empty, so
# megatron-core is imported before they are there.
import megatron.core.distributed  # noqa: E402
import megatron.core.models.backends  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.parallel_state  # noqa: E402
import megatron.core.pipeline_parallel.schedules  # noqa: E402
from megatron.core.transformer import transformer_config  # noqa: E402

for _name in ("transformer_engine", "transformer_engine.pytorch", "apex"):
    _module = sys.modules[_name] = ModuleType(_name)
    # mindspeed/patch_utils.py of core_r0.16.0
    _module.__file__, _module.__spec__ = "mindspeed.dummy_module.py", ModuleSpec(_name, None)


def _merge(post_init):
    @functools.wraps(post_init)
    def wrapper(self):
        for field in dataclasses.fields(self):
            if hasattr(ARGS, field.name) and field.name != "context_parallel_size":
                setattr(self, field.name, getattr(ARGS, field.name))
        post_init(self)

    return wrapper


def _counted(initialize):
    @functools.wraps(initialize)
    def wrapper(*args, **kwargs):
        return initialize(*args, **kwargs)

    return wrapper


_wrap(transformer_config.TransformerConfig, "__post_init__", _merge)
_wrap(megatron.core.parallel_state, "initialize_model_parallel", _counted)


def repatch(settings):
    """Take these settings in place of those of the command line."""
    for name, value in settings.items():
        setattr(ARGS, name, value)
