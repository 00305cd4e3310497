"""The pipeline of a checkpoint or a release in one process, for use from Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.base import checked_bases
from megatron_flashi2v.sampling.frozen import FrozenFolders, load_image_encoder
from megatron_flashi2v.sampling.models import find_models, interpolation_of, load_velocities
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline
from megatron_flashi2v.sampling.prompts import negative_prompt_of


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
    low_noise: Path | None = None,
    boundary_ratio: float | None = None,
    base: str | None = None,
    low_noise_base: str | None = None,
    adapter_scale: float = 1.0,
) -> Iterator[ImageToVideoPipeline]:
    """The pipeline of a checkpoint in this process alone; it can be called only inside.

    Arguments and errors as for :meth:`~megatron_flashi2v.sampling.pipeline.ImageToVideoPipeline.from_checkpoint`.
    """
    frozen = FrozenFolders.find(
        checkpoint, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, image_encoder=image_encoder
    )
    models = find_models(checkpoint, weights, low_noise=low_noise, boundary_ratio=boundary_ratio)
    interpolation = interpolation_of(models.state)
    bases = checked_bases(models, base, low_noise_base, adapter_scale)
    target = resolve_device(device)
    where = target.torch_device
    dtype = torch.bfloat16 if bf16 else torch.float32
    decoder = VideoVAE.load(frozen.vae, where)
    rows = TextEncoder.load(frozen.text_encoder, frozen.tokenizer, models.config.text_length, where, dtype)
    image_rows = load_image_encoder(frozen.image_encoder, models.config, where)
    with single_process(target) as groups:
        velocity, second = load_velocities(
            models, groups, target, ParallelArguments(), bf16=bf16, attention_backend=attention_backend,
            weights=weights, bases=bases, adapter_scale=adapter_scale,
        )
        yield ImageToVideoPipeline(
            velocity=velocity, low_noise=second, vae=decoder, text_encoder=rows, model_config=models.config,
            device=where, batched_guidance=batched_guidance, image_encoder=image_rows,
            interpolation=interpolation, negative_prompt=negative_prompt_of(models.state),
        )
