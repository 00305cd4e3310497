"""What sampling loads, for one video or many: a checkpoint's facts, the encoders, and the pipeline on a layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.clips import Interpolation
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.layout import check_layout, model_ranks
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.rules import check_tokens
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.encoders.image import ImageEncoder
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.replicas import Replica
from megatron_flashi2v.runtime.device import Device, resolve_device
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.sampling.base import Bases, checked_bases
from megatron_flashi2v.sampling.experts import require_pair
from megatron_flashi2v.sampling.frozen import FrozenFolders, load_image_encoder
from megatron_flashi2v.sampling.models import FoundModels, find_models, interpolation_of, load_velocities
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline, latent_shape_of
from megatron_flashi2v.sampling.prompts import negative_prompt_of, require_prompt

DEFAULT_FRAMES, DEFAULT_HEIGHT, DEFAULT_WIDTH, DEFAULT_FPS = 49, 480, 832, 16.0


@dataclass(frozen=True, kw_only=True)
class VideoShape:
    """Video frames, pixels and frames per second of the sample."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is sampled from: a model, or a pair of experts, and where the frozen models lie.

    Attributes:
        negative_prompt: of the flags, or the release's, or else ours.
        interpolation: likewise, of images that are resized, or the training data's.
        bases: of adapters.
    """

    frozen: FrozenFolders
    models: FoundModels
    negative_prompt: str
    interpolation: Interpolation
    bases: Bases

    @property
    def folder(self) -> Path:
        """Of the model, or of a pair's first."""
        return self.models.folder

    @property
    def model(self) -> ModelConfig:
        """Resolved dimensions, of each."""
        return self.models.config

    @property
    def state(self) -> Mapping[str, Any]:
        """What training recorded."""
        return self.models.state

    @classmethod
    def find(cls, config: SampleConfig) -> Source:
        """What the flags name.

        Raises:
            ConfigError: a frozen model is neither given nor in a release, or flags of a pair are given for one model.
            CheckpointError: see :func:`~megatron_flashi2v.sampling.models.find_models`, or an unknown interpolation is
                recorded.
        """
        frozen = FrozenFolders.find(
            config.load, vae=config.vae, text_encoder=config.text_encoder, tokenizer=config.tokenizer,
            image_encoder=config.image_encoder,
        )
        models = find_models(
            config.load, config.weights, low_noise=config.low_noise, boundary_ratio=config.boundary_ratio
        )
        bases = checked_bases(models, config.base, config.low_noise_base, config.adapter_scale)
        require_pair(config.sampler.guidance_scale_2, models.low_noise)
        if config.text_cleaning is not None:
            model = dataclasses.replace(models.config, text_cleaning=config.text_cleaning)
            models = dataclasses.replace(models, config=model)
        return cls(
            frozen=frozen, models=models, negative_prompt=negative_prompt_of(models.state, config.negative_prompt),
            interpolation=interpolation_of(models.state, config.interpolation), bases=bases,
        )


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen models on this process's device."""

    device: Device
    vae: VideoVAE
    text: TextEncoder
    image: ImageEncoder | None

    @classmethod
    def load(cls, config: SampleConfig, source: Source, launch: LaunchEnvironment) -> Encoders:
        """Those of the source, as the flags want them.

        Raises:
            ConfigError: a folder is missing or damaged, or there is no such device.
        """
        device = resolve_device(config.device, launch.local_rank)
        where, dtype = device.torch_device, torch.bfloat16 if config.bf16 else torch.float32
        vae = VideoVAE.load(source.frozen.vae, where)
        if config.vae_tiling:
            vae.enable_tiling()
        text = TextEncoder.load(
            source.frozen.text_encoder, source.frozen.tokenizer, source.model.text_length, where, dtype
        )
        image = load_image_encoder(source.frozen.image_encoder, source.model, where)
        return cls(device=device, vae=vae, text=text, image=image)

    def latent_shape(self, model: ModelConfig, shape: VideoShape) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a video's latents.

        Raises:
            ConfigError: the size does not fit the VAE and the model.
        """
        latent_shape = latent_shape_of(self.vae, model, shape.num_frames, shape.height, shape.width)
        check_tokens(model, latent_shape[1:])
        return latent_shape


class RecentRows:
    """A text encoder that remembers its last two prompts: those of guidance, which come again at the next video.

    Args:
        encoder: does the work.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.text_dim = encoder.text_dim
        self._rows = functools.lru_cache(maxsize=2)(lambda prompt: encoder.encode([prompt])[0])

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """As :meth:`TextEncoder.encode`."""
        return [self._rows(prompt) for prompt in prompts]


def require_processes(config: SampleConfig, model: ModelConfig, launch: LaunchEnvironment) -> None:
    """One video is made by one replica, which takes all processes; many are divided over any number of replicas.

    Raises:
        ConfigError: the layout does not fit the model, or another number of processes was started.
    """
    check_layout(config.parallel, model, launch.world_size)
    guidance = config.guidance_parallel_size
    ranks = model_ranks(config.parallel) * guidance
    if config.requests is None and launch.world_size != ranks:
        raise ConfigError(
            f"{launch.world_size} processes were started, but the layout takes {ranks}, and there is one video to "
            "make; start that many, or raise --tensor-model-parallel-size, --context-parallel-size, "
            "--pipeline-model-parallel-size or --guidance-parallel-size"
        )
    if launch.world_size % ranks:
        raise ConfigError(
            f"{launch.world_size} processes were started, but --guidance-parallel-size {guidance} of models on "
            f"{model_ranks(config.parallel)} takes {ranks} for each video; start a multiple of {ranks}"
        )


def require_prompts(model: ModelConfig, prompt: str, negative_prompt: str) -> None:
    """:func:`~megatron_flashi2v.sampling.prompts.require_prompt` of both."""
    require_prompt(prompt, model.text_cleaning)
    require_prompt(negative_prompt, model.text_cleaning, "negative prompt")


def video_shape(config: SampleConfig, state: Mapping[str, Any], wanted: object = None) -> VideoShape:
    """What is wanted of this video, else the flags, else the training data's, else the released models' 49 x 480 x 832.

    Args:
        config: flags.
        state: what training recorded.
        wanted: has ``num_frames``, ``height`` and ``width``, each maybe None.
    """
    recorded = state.get("data")
    recorded = recorded if isinstance(recorded, Mapping) else {}

    def choose(name: str, recorded_name: str, default: float) -> float:
        given = (getattr(wanted, name, None), getattr(config, name), recorded.get(recorded_name), default)
        return next(value for value in given if value is not None)

    return VideoShape(
        num_frames=int(choose("num_frames", "frames", DEFAULT_FRAMES)),
        height=int(choose("height", "height", DEFAULT_HEIGHT)),
        width=int(choose("width", "width", DEFAULT_WIDTH)),
        fps=float(choose("fps", "fps", DEFAULT_FPS)),
    )


def load_pipeline(
    config: SampleConfig, source: Source, encoders: Encoders, groups: Groups, replica: Replica
) -> ImageToVideoPipeline:
    """The pipeline on this rank's part of the model.

    Raises:
        UserError: the weights are damaged, or the parts do not fit together.
    """
    velocity, low_noise = load_velocities(
        source.models, groups, encoders.device, config.parallel, bf16=config.bf16,
        attention_backend=config.attention_backend, weights=config.weights,
        bases=source.bases, adapter_scale=config.adapter_scale,
    )
    return ImageToVideoPipeline(
        velocity=velocity, low_noise=low_noise, vae=encoders.vae, text_encoder=RecentRows(encoders.text),
        model_config=source.model, device=encoders.device.torch_device, batched_guidance=config.batched_guidance,
        guidance_group=replica.models, image_encoder=encoders.image,
        interpolation=source.interpolation, negative_prompt=source.negative_prompt,
    )


def call_options(config: SampleConfig, shape: VideoShape) -> dict[str, Any]:
    """What the flags say about a call of the pipeline."""
    return {
        "num_frames": shape.num_frames,
        "height": shape.height,
        "width": shape.width,
        "num_steps": config.sampler.num_steps,
        "solver": config.sampler.solver,
        "guidance_scale": config.sampler.guidance_scale,
        "guidance_scale_2": config.sampler.guidance_scale_2,
        "shift": config.sampler.shift,
        "cutoff_ratio": config.image_settings.cutoff_ratio,
        "image_noise": config.image_settings.image_noise,
    }
