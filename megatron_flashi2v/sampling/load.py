"""A checkpoint's transformer in one process, whatever layout it was trained at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.checkpoint import find_checkpoint, load_model_config
from megatron_flashi2v.checkpoint.state import ShardGrid
from megatron_flashi2v.checkpoint.state import load_model as load_parameters
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups, destroy_groups, make_groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.distributed import init_distributed, shutdown
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.runtime.redirect import megatron_on
from megatron_flashi2v.sampling.guidance import VelocityFunction


@contextlib.contextmanager
def single_process(device: Device) -> Iterator[Groups]:
    """megatron-core's surroundings for a model that is not divided: redirection, process group, groups of one.

    The model can be built and called only inside. A launcher's variables are ignored: each process is on its own.
    """
    with megatron_on(device):
        init_distributed(detect_launch({}), device)
        try:
            yield make_groups(ParallelArguments())
        finally:
            destroy_groups()
            shutdown()


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path stands for: an ``iter_*`` folder, or the latest under a ``--save`` folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = find_checkpoint(path)
    if folder is None:
        found = "holds no checkpoint yet" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {found}; give a folder that `flashi2v train --save` wrote, or one iter_* in it"
        )
    return folder


def build_model(
    config: ModelConfig,
    groups: Groups,
    device: Device,
    *,
    bf16: bool = False,
    attention_backend: str = "auto",
) -> DiffusionTransformer:
    """The transformer in evaluation mode on the device; its weights are not set yet.

    Args:
        config: dimensions and paradigm.
        groups: from :func:`single_process`.
        device: where the model lives.
        bf16: matrix products and the residual stream in bfloat16.
        attention_backend: implementation of attention, or auto.

    Raises:
        ConfigError: the attention backend cannot run here.
    """
    spec = make_spec(config, groups, device.torch_device, bf16=bf16, attention_backend=attention_backend)
    return DiffusionTransformer(spec).to(device.torch_device).eval()


def load_model(
    folder: Path,
    groups: Groups,
    device: Device,
    *,
    bf16: bool = False,
    attention_backend: str = "auto",
) -> DiffusionTransformer:
    """Build the model that a checkpoint is of, and fill it; arguments as for :func:`build_model`.

    Args:
        folder: one checkpoint (see :func:`resolve_checkpoint`), saved at any layout.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the attention backend cannot run here.
    """
    model = build_model(
        load_model_config(folder), groups, device, bf16=bf16, attention_backend=attention_backend
    )
    load_parameters(folder, model.named_parameters(), ShardGrid())
    return model


def velocity_of(model: DiffusionTransformer) -> VelocityFunction:
    """The model as the function that the pipeline takes."""
    return torch.no_grad()(partial(predict_velocity, model))
