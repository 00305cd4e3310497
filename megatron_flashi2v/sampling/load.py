"""A checkpoint's or a release's transformer for sampling, whatever layout it was trained at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.adapter_record import read_adapter_record
from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_model_config, load_state
from megatron_flashi2v.checkpoint.model_state import holds_weights, load_weights
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.conversion.containers import EXPERTS
from megatron_flashi2v.conversion.formats import diffusers
from megatron_flashi2v.conversion.initial_weights import load_initial_weights, open_base, open_initial_weights
from megatron_flashi2v.conversion.recognition import find_pair
from megatron_flashi2v.models.adapters import scale_adapters
from megatron_flashi2v.models.build import build_stages
from megatron_flashi2v.models.context_memory import ContextMemory
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.models.weight_shards import whole_weights
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.placement import shard_grid
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.files import read_json_object
from megatron_flashi2v.sampling.frozen import is_release
from megatron_flashi2v.sampling.guidance import VelocityFunction


def resolve_checkpoint(path: Path, weights: str = "model") -> Path:
    """The folder that a path stands for: an ``iter_*`` folder, the newest good one under ``--save``, or a release, or
    a transformer's folder in one.

    A checkpoint's files that hold the weights, ``model`` or ``ema``, are verified. Every process does so by itself:
    this is asked before there are groups, and the processes of a node share what is read.

    Raises:
        CheckpointError: there is none, or two beside each other; the ``iter_*`` folder is damaged, or a release is
            asked for averaged weights.
    """
    if _is_diffusers(path):
        if weights != "model":
            raise CheckpointError(f"{path} is a release, which holds one set of weights; leave out --weights {weights}")
        return path
    _refuse_pair(path)
    folder = find_checkpoint(path, needs=partial(holds_weights, weights))
    if folder is None:
        found = "holds no checkpoint yet" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {found}; give a folder that `flashi2v train --save` wrote, one iter_* in it, or a release"
        )
    return folder


def _refuse_pair(path: Path) -> None:
    """Say how both are given, where a folder holds two experts beside each other."""
    pair = find_pair(path)
    if pair is None:
        return
    both = f"{path} holds two models, the experts for high and for low noise"
    if pair.form in ("megatron", "diffusers"):
        raise CheckpointError(f"{both}; give both, --load {pair.high} --low-noise {pair.low}")
    raise CheckpointError(
        f"{both}, in a format that sampling does not read; convert them, flashi2v convert --from "
        f"{pair.form} {pair.high} --low-noise {pair.low} --to megatron OUT, and give --load OUT/{EXPERTS[0]} "
        f"--low-noise OUT/{EXPERTS[1]}"
    )


def describe(folder: Path) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The model of a checkpoint or a release, and what is recorded of its training.

    Args:
        folder: see :func:`resolve_checkpoint`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not _is_diffusers(folder):
        return load_model_config(folder), load_state(folder)
    transformer = folder / diffusers.TRANSFORMER if is_release(folder) else folder
    config = diffusers.read_config(transformer, diffusers.conditioning_of(transformer))
    return config, diffusers.recorded_facts(transformer)


def _is_diffusers(folder: Path) -> bool:
    """Whether a folder is a release, or a transformer's in one."""
    if is_release(folder):
        return True
    path = folder / "config.json"
    stated = read_json_object(path, error=CheckpointError) if path.is_file() else {}
    return stated.get("_class_name") == diffusers.TRANSFORMER_CLASS


def load_stages(
    folder: Path,
    groups: Groups,
    device: Device,
    parallel: ParallelArguments,
    *,
    bf16: bool = False,
    attention_backend: str = "auto",
    weights: str = "model",
    base: tuple[str, Path] | None = None,
    base_flag: str = "--base",
    adapter_scale: float = 1.0,
) -> list[DiffusionTransformer]:
    """Build this rank's stages of a model in evaluation mode, and fill them.

    A checkpoint of adapters, or of a part of the weights, is filled up from its base.

    Args:
        folder: a checkpoint or a release (see :func:`resolve_checkpoint`), saved at any layout.
        groups: from :func:`~megatron_flashi2v.parallel.world.world`.
        device: where the model lives.
        parallel: the layout that the groups were made for.
        bf16: matrix products and the residual stream in bfloat16.
        attention_backend: implementation of attention, or auto.
        weights: ``model``, or ``ema`` for the averaged ones.
        base: format and path of an adapter's base; by default where it was in training.
        base_flag: that names it, for messages.
        adapter_scale: what adapters' products are multiplied with besides; 0 is the base alone.

    Raises:
        CheckpointError: a file is missing or damaged, or holds no averaged weights though they are asked for; or the
            base is not the adapter's.
        ConfigError: the attention backend cannot run here; or the last two are given of a whole model.
    """
    config, _ = describe(folder)
    record = None if is_release(folder) else read_adapter_record(folder)
    adapter = None if record is None else record.adapter
    spec = make_spec(
        config, groups, device.torch_device, bf16=bf16, attention_backend=attention_backend, adapter=adapter
    )
    stages = [stage.eval() for stage in build_stages(spec, parallel)]
    for stage in stages:
        scale_adapters(stage, adapter_scale)
    parameters = (named for stage in stages for named in stage.named_parameters())
    shards = whole_weights(parameters, shard_grid(groups))
    if _is_diffusers(folder):
        load_initial_weights(open_initial_weights(("diffusers", folder), config), shards)
        return stages
    if record is not None:
        load_initial_weights(open_base(folder, record, config, base, base_flag), shards)
        held = record.shapes(config)
        shards = [shard for shard in shards if shard.name in held]
    load_weights(folder, shards, weights=weights)
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

    Every rank of a divided model must call it with the same arguments, and gets the same velocity. It remembers what
    the model makes of the last texts: weights and the texts' tensors must stay as they are while it is used.
    """
    return torch.no_grad()(partial(predict_velocity, model, memory=ContextMemory()))
