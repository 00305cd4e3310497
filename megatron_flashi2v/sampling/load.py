"""A checkpoint's transformer for sampling, whatever layout it was trained at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_model_config
from megatron_flashi2v.checkpoint.model_state import holds_weights, load_parameters, shard_grid
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.layout import stage_layer_counts
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.stages import stages_of_rank
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups, destroy_groups, make_groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.distributed import init_distributed, shutdown
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch
from megatron_flashi2v.runtime.redirect import megatron_on
from megatron_flashi2v.sampling.guidance import VelocityFunction


@contextlib.contextmanager
def replica(device: Device, launch: LaunchEnvironment, parallel: ParallelArguments) -> Iterator[Groups]:
    """megatron-core's surroundings for a model that is divided over all started processes.

    Redirection, process group and groups; the model can be built and called only inside.
    """
    with megatron_on(device):
        init_distributed(launch, device)
        try:
            yield make_groups(parallel)
        except BaseException:
            shutdown(failed=True)  # without waiting for the others
            raise
        else:
            shutdown()
        finally:
            destroy_groups()


def single_process(device: Device) -> contextlib.AbstractContextManager[Groups]:
    """The same for a model that is not divided. A launcher's variables are ignored: each process is on its own."""
    return replica(device, detect_launch({}), ParallelArguments())


def resolve_checkpoint(path: Path, weights: str = "model") -> Path:
    """The checkpoint folder that a path stands for: an ``iter_*`` folder, or the newest good one under ``--save``.

    The files that hold the weights, ``model`` or ``ema``, are verified. Every process does so by itself: this is
    asked before there are groups, and the processes of a node share what is read.

    Raises:
        CheckpointError: there is none, or the ``iter_*`` folder is damaged.
    """
    folder = find_checkpoint(path, needs=partial(holds_weights, weights))
    if folder is None:
        found = "holds no checkpoint yet" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {found}; give a folder that `flashi2v train --save` wrote, or one iter_* in it"
        )
    return folder


def build_stages(
    config: ModelConfig,
    groups: Groups,
    device: Device,
    parallel: ParallelArguments,
    *,
    bf16: bool = False,
    attention_backend: str = "auto",
) -> list[DiffusionTransformer]:
    """This rank's stages of the transformer in evaluation mode on the device; their weights are not set yet.

    Args:
        config: dimensions and paradigm.
        groups: from :func:`replica`.
        device: where the model lives.
        parallel: the layout that the groups were made for.
        bf16: matrix products and the residual stream in bfloat16.
        attention_backend: implementation of attention, or auto.

    Raises:
        ConfigError: the attention backend cannot run here.
    """
    spec = make_spec(config, groups, device.torch_device, bf16=bf16, attention_backend=attention_backend)
    counts = stage_layer_counts(parallel, config.num_layers)
    return [
        DiffusionTransformer(spec, stage).to(device.torch_device).eval()
        for stage in stages_of_rank(counts, groups.pp.size(), groups.pp.rank())
    ]


def load_stages(
    folder: Path,
    groups: Groups,
    device: Device,
    parallel: ParallelArguments,
    *,
    bf16: bool = False,
    attention_backend: str = "auto",
    weights: str = "model",
) -> list[DiffusionTransformer]:
    """Build this rank's part of the model that a checkpoint is of, and fill it; arguments as for :func:`build_stages`.

    Args:
        folder: one checkpoint (see :func:`resolve_checkpoint`), saved at any layout.
        weights: ``model``, or ``ema`` for the averaged ones.

    Raises:
        CheckpointError: a file is missing or damaged, or holds no averaged weights though they are asked for.
        ConfigError: the attention backend cannot run here.
    """
    config = load_model_config(folder)
    stages = build_stages(config, groups, device, parallel, bf16=bf16, attention_backend=attention_backend)
    parameters = [named for stage in stages for named in stage.named_parameters()]
    load_parameters(folder, parameters, shard_grid(groups), weights=weights)
    return stages


def build_model(
    config: ModelConfig, groups: Groups, device: Device, *, bf16: bool = False, attention_backend: str = "auto"
) -> DiffusionTransformer:
    """The whole transformer, in :func:`single_process`; arguments as for :func:`build_stages`."""
    (model,) = build_stages(
        config, groups, device, ParallelArguments(), bf16=bf16, attention_backend=attention_backend
    )
    return model


def load_model(
    folder: Path, groups: Groups, device: Device, *, bf16: bool = False, attention_backend: str = "auto"
) -> DiffusionTransformer:
    """The whole transformer of a checkpoint, in :func:`single_process`; arguments as for :func:`load_stages`."""
    (model,) = load_stages(
        folder, groups, device, ParallelArguments(), bf16=bf16, attention_backend=attention_backend
    )
    return model


def velocity_of(model: DiffusionTransformer | Sequence[DiffusionTransformer]) -> VelocityFunction:
    """The model, or this rank's stages of it, as the function that the pipeline takes.

    Every rank of a divided model must call it with the same arguments, and gets the same velocity.
    """
    return torch.no_grad()(partial(predict_velocity, model))
