"""A checkpoint's or a release's transformer for sampling, whatever layout it was trained at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_model_config, load_state
from megatron_flashi2v.checkpoint.model_state import holds_weights, load_weights
from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.fields import spelling
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.conversion.formats import diffusers
from megatron_flashi2v.conversion.initial_weights import load_initial_weights, open_initial_weights
from megatron_flashi2v.encoders.image import ImageEncoder
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.models.build import build_stages
from megatron_flashi2v.models.context_memory import ContextMemory
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.models.weight_shards import whole_weights
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.placement import shard_grid
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import Device, resolve_device
from megatron_flashi2v.runtime.files import read_json_object
from megatron_flashi2v.sampling.guidance import VelocityFunction
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline


def resolve_checkpoint(path: Path, weights: str = "model") -> Path:
    """The folder that a path stands for: an ``iter_*`` folder, the newest good one under ``--save``, or a release.

    A checkpoint's files that hold the weights, ``model`` or ``ema``, are verified. Every process does so by itself:
    this is asked before there are groups, and the processes of a node share what is read.

    Raises:
        CheckpointError: there is none, the ``iter_*`` folder is damaged, or a release is asked for averaged weights.
    """
    if is_release(path):
        if weights != "model":
            raise CheckpointError(f"{path} is a release, which holds one set of weights; leave out --weights {weights}")
        return path
    folder = find_checkpoint(path, needs=partial(holds_weights, weights))
    if folder is None:
        found = "holds no checkpoint yet" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {found}; give a folder that `flashi2v train --save` wrote, one iter_* in it, or a release"
        )
    return folder


def is_release(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline's, such as ``flashi2v convert --to diffusers`` writes."""
    return (folder / diffusers.PIPELINE_NAME).is_file()


@dataclass(frozen=True, kw_only=True)
class FrozenFolders:
    """Where the frozen models lie: folders, or OWNER/NAME:SUBFOLDER of Hub repositories."""

    vae: Path
    text_encoder: Path
    tokenizer: Path
    image_encoder: Path | None = None

    @classmethod
    def find(
        cls, checkpoint: Path, *, vae: Path | None, text_encoder: Path | None, tokenizer: Path | None,
        image_encoder: Path | None,
    ) -> FrozenFolders:
        """Those that are given, and of the others those that a release holds or names.

        Args:
            checkpoint: see :func:`resolve_checkpoint`.
            vae: None takes the release's.
            text_encoder: likewise.
            tokenizer: likewise.
            image_encoder: likewise; few models have one.

        Raises:
            ConfigError: one is neither given nor in the release, or there is no release.
        """
        given = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        missing = [name for name, place in given.items() if place is None]
        held: Mapping[str, Path] = _parts_of_release(checkpoint, missing) if missing else {}
        if image_encoder is None:
            image_encoder = _parts_of_release(checkpoint, ["image_encoder"]).get("image_encoder")
        absent = [spelling(name) for name in missing if name not in held]
        if absent:
            why = "is a release without these parts" if is_release(checkpoint) else "is no release, which holds them"
            raise ConfigError(f"{', '.join(absent)} must be given: --load {checkpoint} {why}")
        places = {name: held[name] if place is None else place for name, place in given.items()}
        return cls(**places, image_encoder=image_encoder)


def _parts_of_release(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Those of the named parts that a release holds, or says where they lie; none of what is no release."""
    if not is_release(folder):
        return {}
    references = read_json_object(folder / diffusers.PIPELINE_NAME, error=CheckpointError).get(diffusers.REFERENCES)
    references = references if isinstance(references, dict) else {}
    parts = {name: folder / name for name in names if (folder / name).is_dir()}
    return {name: Path(str(references[name])) for name in names if name in references} | parts


def describe(folder: Path) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The model of a checkpoint or a release, and what is recorded of its training.

    Args:
        folder: see :func:`resolve_checkpoint`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not is_release(folder):
        return load_model_config(folder), load_state(folder)
    config = diffusers.read_config(folder / diffusers.TRANSFORMER, folder / diffusers.CONDITIONING)
    index = read_json_object(folder / diffusers.PIPELINE_NAME, error=CheckpointError)
    data = {key: index[name] for name, key in diffusers.PIPELINE_DEFAULTS.items() if name in index}
    return config, {"data": data}


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
    """Build this rank's stages of a model in evaluation mode, and fill them.

    Args:
        folder: a checkpoint or a release (see :func:`resolve_checkpoint`), saved at any layout.
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
    config, _ = describe(folder)
    spec = make_spec(config, groups, device.torch_device, bf16=bf16, attention_backend=attention_backend)
    stages = [stage.eval() for stage in build_stages(spec, parallel)]
    parameters = (named for stage in stages for named in stage.named_parameters())
    shards = whole_weights(parameters, shard_grid(groups))
    if is_release(folder):
        load_initial_weights(open_initial_weights(("diffusers", folder), config), shards)
    else:
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


def load_image_encoder(folder: Path | None, model: ModelConfig, device: torch.device) -> ImageEncoder | None:
    """The image encoder whose rows the model attends to; None for a model that attends to none.

    Raises:
        ConfigError: the model needs one and ``folder`` is None, or the folder is missing or damaged.
    """
    if not paradigm_of(model).image_rows(model):
        return None
    if folder is None:
        raise ConfigError(
            f"--image-encoder must be given: the model's conditioning is {model.conditioning}, which attends to an "
            "image encoder's rows"
        )
    return ImageEncoder.load(folder, device)


@contextlib.contextmanager
def open_pipeline(
    checkpoint: Path,
    *,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
    weights: str = "model",
    bf16: bool = False,
    attention_backend: str = "auto",
    batched_guidance: bool = False,
    image_encoder: Path | None = None,
) -> Iterator[ImageToVideoPipeline]:
    """The pipeline of a checkpoint in this process alone; it can be called only inside.

    Arguments and errors as for :meth:`~megatron_flashi2v.sampling.pipeline.ImageToVideoPipeline.from_checkpoint`.
    """
    frozen = FrozenFolders.find(
        checkpoint, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, image_encoder=image_encoder
    )
    folder = resolve_checkpoint(checkpoint, weights)
    config, _ = describe(folder)
    target = resolve_device(device)
    where = target.torch_device
    dtype = torch.bfloat16 if bf16 else torch.float32
    decoder = VideoVAE.load(frozen.vae, where)
    rows = TextEncoder.load(frozen.text_encoder, frozen.tokenizer, config.text_length, where, dtype)
    image_rows = load_image_encoder(frozen.image_encoder, config, where)
    with single_process(target) as groups:
        stages = load_stages(
            folder, groups, target, ParallelArguments(), bf16=bf16, attention_backend=attention_backend,
            weights=weights,
        )
        yield ImageToVideoPipeline(
            velocity=velocity_of(stages), vae=decoder, text_encoder=rows, model_config=config, device=where,
            batched_guidance=batched_guidance, image_encoder=image_rows,
        )
