"""A checkpoint's transformer for sampling, whatever layout it was trained at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_model_config
from megatron_flashi2v.checkpoint.model_state import holds_weights, load_parameters
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.models.build import build_stages
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.placement import shard_grid
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import Device, resolve_device
from megatron_flashi2v.sampling.guidance import VelocityFunction
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline


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
    """Build this rank's stages of a checkpoint's model in evaluation mode, and fill them.

    Args:
        folder: one checkpoint (see :func:`resolve_checkpoint`), saved at any layout.
        groups: from :func:`~megatron_flashi2v.parallel.world.world`.
        device: where the model lives.
        parallel: the layout that the groups were made for.
        bf16: matrix products and the residual stream in bfloat16.
        attention_backend: implementation of attention, or auto.
        weights: ``model``, or ``ema`` for the averaged ones.

    Raises:
        CheckpointError: a file is missing or damaged, or holds no averaged weights though they are asked for.
        ConfigError: the attention backend cannot run here.
    """
    config = load_model_config(folder)
    spec = make_spec(config, groups, device.torch_device, bf16=bf16, attention_backend=attention_backend)
    stages = [stage.eval() for stage in build_stages(spec, parallel)]
    parameters = [named for stage in stages for named in stage.named_parameters()]
    load_parameters(folder, parameters, shard_grid(groups), weights=weights)
    return stages


def load_model(
    folder: Path, groups: Groups, device: Device, *, bf16: bool = False, attention_backend: str = "auto"
) -> DiffusionTransformer:
    """The whole transformer of a checkpoint; arguments and errors as for :func:`load_stages`.

    The groups are those of :func:`~megatron_flashi2v.parallel.world.single_process`.
    """
    (model,) = load_stages(
        folder, groups, device, ParallelArguments(), bf16=bf16, attention_backend=attention_backend
    )
    return model


def velocity_of(model: DiffusionTransformer | Sequence[DiffusionTransformer]) -> VelocityFunction:
    """The model, or this rank's stages of it, as the function that the pipeline takes.

    Every rank of a divided model must call it with the same arguments, and gets the same velocity.
    """
    return torch.no_grad()(partial(predict_velocity, model))


@contextlib.contextmanager
def open_pipeline(
    checkpoint: Path,
    *,
    vae: Path,
    text_encoder: Path,
    tokenizer: Path,
    device: str = "auto",
    weights: str = "model",
    bf16: bool = False,
    attention_backend: str = "auto",
    batched_guidance: bool = False,
) -> Iterator[ImageToVideoPipeline]:
    """The pipeline of a checkpoint in this process alone; it can be called only inside.

    Arguments and errors as for :meth:`~megatron_flashi2v.sampling.pipeline.ImageToVideoPipeline.from_checkpoint`.
    """
    folder = resolve_checkpoint(checkpoint, weights)
    config = load_model_config(folder)
    target = resolve_device(device)
    where = target.torch_device
    dtype = torch.bfloat16 if bf16 else torch.float32
    decoder = VideoVAE.load(vae, where)
    rows = TextEncoder.load(text_encoder, tokenizer, config.text_length, where, dtype)
    with single_process(target) as groups:
        stages = load_stages(
            folder, groups, target, ParallelArguments(), bf16=bf16, attention_backend=attention_backend,
            weights=weights,
        )
        yield ImageToVideoPipeline(
            velocity=velocity_of(stages), vae=decoder, text_encoder=rows, model_config=config, device=where,
            batched_guidance=batched_guidance,
        )
