"""The library of the blocks' linears, megatron-core or Transformer Engine, and their precision."""

from __future__ import annotations

import importlib
import importlib.metadata
from contextlib import AbstractContextManager
from typing import Any

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer import TransformerConfig

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.train import BackendArguments
from megatron_flashi2v.parallel.linear import FusedColumnParallelLinear, FusedRowParallelLinear


class FusedSpecProvider(LocalSpecProvider):
    """megatron-core's own linears with our product."""

    def column_parallel_linear(self) -> type:
        """Class of linears with sharded outputs."""
        return FusedColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Class of linears with sharded inputs."""
        return FusedRowParallelLinear


def linear_provider(backend: BackendArguments) -> BackendSpecProvider:
    """The provider of linear classes.

    Raises:
        ConfigError: Transformer Engine is not installed, or cannot be loaded.
    """
    if backend.transformer_impl == "local":
        return FusedSpecProvider()
    try:  # MindSpeed puts an empty module in its place, and makes importlib.metadata.version answer for it
        version = importlib.metadata.distribution("transformer_engine").version
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "--transformer-impl is transformer_engine, which is not installed; install transformer-engine[pytorch] (it "
            "needs CUDA), or choose local"
        ) from None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # it loads CUDA's libraries, which fail in many ways
        raise ConfigError(
            f"--transformer-impl is transformer_engine, but version {version} cannot be loaded "
            f"({type(error).__name__}: {error}); install the version that matches torch and CUDA, or choose local"
        ) from error
    module = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
    return module.TESpecProvider()


def megatron_fields(backend: BackendArguments) -> dict[str, Any]:
    """Fields of megatron-core's configuration."""
    return {
        "transformer_impl": backend.transformer_impl,
        "fp8": backend.fp8_format,
        "fp8_recipe": backend.fp8_recipe,
        # Otherwise every linear must be told which microbatch is a step's first, and would reuse FP8 weights of earlier
        # steps if it were not.
        "disable_parameter_transpose_cache": True,
    }


def block_precision(megatron: TransformerConfig) -> AbstractContextManager[Any]:
    """Enter Transformer Engine's FP8 for the blocks' matrix products, if it was chosen."""
    return get_fp8_context(megatron)
