"""``sample(config)``: one video from an image and a prompt, alone or as one of a launcher's processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.layout import check_layout, model_ranks
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.rules import check_tokens
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.parallel.world import world
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.files import atomic_write_bytes
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.runtime.progress import progress
from megatron_flashi2v.sampling.image import load_image
from megatron_flashi2v.sampling.load import describe, load_stages, resolve_checkpoint, velocity_of
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline, SampledVideo, latent_shape_of
from megatron_flashi2v.sampling.video import StripRow, is_strip, write_comparison, write_mp4

DEFAULT_FRAMES, DEFAULT_HEIGHT, DEFAULT_WIDTH, DEFAULT_FPS = 49, 480, 832, 16.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VideoShape:
    """Video frames, pixels and frames per second of the sample."""

    num_frames: int
    height: int
    width: int
    fps: float


def sample(config: SampleConfig) -> SampledVideo:
    """Load everything, sample one video, and write the mp4 and the strip of frames (on rank 0).

    Every process that a launcher started calls it alike; they divide the model.

    Args:
        config: such as ``SampleConfig.from_flags(load="runs/tiny", image="cat.png", prompt="...", ...)``.

    Raises:
        UserError: a file, a checkpoint or a setting is wrong.
    """
    launch = detect_launch(os.environ)
    with logging_to_stderr(launch.rank):
        return _sample(config, launch)


def _sample(config: SampleConfig, launch: LaunchEnvironment) -> SampledVideo:
    # Cheap checks first: nobody should wait for 14 billion weights to hear of a misspelt file.
    require_outputs(config)
    folder = resolve_checkpoint(config.load, config.weights)
    model_config, state = describe(folder)
    require_processes(config.parallel, model_config, launch)
    shape = video_shape(config, state)
    images = condition_images(config, model_config)
    device = resolve_device(config.device, launch.local_rank)
    vae = VideoVAE.load(config.vae, device.torch_device)
    latent_shape = latent_shape_of(vae, model_config, shape.num_frames, shape.height, shape.width)
    check_tokens(model_config, latent_shape[1:])
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    text_encoder = TextEncoder.load(
        config.text_encoder, config.tokenizer, model_config.text_length, device.torch_device, dtype
    )
    logger.info(
        "sampling %d frames of %dx%d from %s on %s",
        shape.num_frames,
        shape.height,
        shape.width,
        folder,
        device.describe(),
    )
    with world(device, launch, config.parallel) as groups:
        stages = load_stages(
            folder, groups, device, config.parallel, bf16=config.bf16, attention_backend=config.attention_backend,
            weights=config.weights,
        )
        pipeline = ImageToVideoPipeline(
            velocity=velocity_of(stages),
            vae=vae,
            text_encoder=text_encoder,
            model_config=model_config,
            device=device.torch_device,
            batched_guidance=config.batched_guidance,
        )
        video = _run(pipeline, images, config, shape, launch.rank)
    if launch.rank == 0:
        write(video, config, shape.fps)
    return video


def require_processes(parallel: ParallelArguments, model: ModelConfig, launch: LaunchEnvironment) -> None:
    """One video is made by one replica of the model, which takes all processes.

    Raises:
        ConfigError: the layout does not fit the model, or another number of processes was started.
    """
    check_layout(parallel, model, launch.world_size)
    if launch.world_size != model_ranks(parallel):
        raise ConfigError(
            f"{launch.world_size} processes were started, but the layout takes {model_ranks(parallel)}, and there is "
            "one video to make; start that many, or raise --tensor-model-parallel-size, --context-parallel-size or "
            "--pipeline-model-parallel-size"
        )


def strip_path(config: SampleConfig) -> Path:
    """Where the strip of frames goes: beside the mp4 unless said otherwise."""
    return config.strip or config.output.with_suffix(".png")


def require_outputs(config: SampleConfig) -> None:
    """Refuse, before any work, outputs that cannot be written, or that would replace what is not theirs.

    Raises:
        ConfigError: an output is an input or another output, cannot be written, or the strip, which no flag named,
            would replace a picture that is none of our strips.
    """
    strip = strip_path(config)
    named = {"--output": config.output, "--latents": config.latents, "--image": config.image,
             "--strip": strip}  # fmt: skip
    seen: dict[Path, str] = {}
    for flag, path in named.items():
        if path is None:
            continue
        if flag != "--image":
            require_writable(path)
        earlier = seen.setdefault(path.resolve(), flag)
        if earlier != flag:
            cure = "name the strip with --strip" if flag == "--strip" else f"choose another {flag}"
            raise ConfigError(f"{flag} {path} is the file of {earlier} too, and would replace it; {cure}")
    if config.strip is None and strip.exists() and not is_strip(strip):
        raise ConfigError(
            f"the strip of frames would replace {strip}, which flashi2v did not write; name another file with --strip"
        )


def require_writable(path: Path) -> None:
    """Refuse an output that could not be written after all the work.

    Raises:
        ConfigError: the path is a folder, or lies in something that is no folder or may not be written.
    """
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if path.is_dir():
        raise ConfigError(f"output {path} is a folder; give a file's name in it")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"output {path} cannot be written: {parent} is no folder, or not a writable one")


def video_shape(config: SampleConfig, state: Mapping[str, Any]) -> VideoShape:
    """The flags, else what the checkpoint's training data were, else the released models' 49 x 480 x 832."""
    recorded = state.get("data")
    recorded = recorded if isinstance(recorded, Mapping) else {}

    def choose(flag: float | None, name: str, default: float) -> float:
        return flag if flag is not None else recorded.get(name, default)

    return VideoShape(
        num_frames=int(choose(config.num_frames, "frames", DEFAULT_FRAMES)),
        height=int(choose(config.height, "height", DEFAULT_HEIGHT)),
        width=int(choose(config.width, "width", DEFAULT_WIDTH)),
        fps=float(choose(config.fps, "fps", DEFAULT_FPS)),
    )


def condition_images(config: SampleConfig, model_config: ModelConfig) -> Any:
    """The condition image as a uint8 tensor ``[3, H, W]``; None for a text-to-video model without one.

    Raises:
        ConfigError: the model needs an image and none was given.
        DataError: the file is missing, or no picture or video.
    """
    from megatron_flashi2v.config.errors import ConfigError

    if config.image is not None:
        return load_image(config.image)
    if paradigm_of(model_config).uses_image:
        raise ConfigError(
            f"image is not given, but {config.load} is a {model_config.conditioning} model; give --image FILE"
        )
    return None


def _run(pipeline: Any, images: Any, config: SampleConfig, shape: VideoShape, rank: int) -> SampledVideo:
    """Run the pipeline with a progress bar over its steps; rank 0 alone makes frames."""
    with progress("sampling", config.sampler.num_steps, rank=rank) as report:
        return pipeline(
            images,
            config.prompt,
            num_frames=shape.num_frames,
            height=shape.height,
            width=shape.width,
            negative_prompt=config.negative_prompt,
            num_steps=config.sampler.num_steps,
            solver=config.sampler.solver,
            guidance_scale=config.sampler.guidance_scale,
            shift=config.sampler.shift,
            cutoff_ratio=config.image_settings.cutoff_ratio,
            image_noise=config.image_settings.image_noise,
            seed=config.seed,
            decode=rank == 0,
            callback=lambda done, steps, state: report.advance(),
        )


def write(video: SampledVideo, config: SampleConfig, fps: float) -> tuple[Path, Path]:
    """Write the mp4 and, beside it, the condition image with frames of the sample; returns both paths."""
    assert video.frames_BTHWC is not None, "rank 0 decodes"
    strip = strip_path(config)
    frames_THWC = video.frames_BTHWC[0]
    write_mp4(config.output, frames_THWC, fps)
    rows = [StripRow(frames_THWC=frames_THWC, label=f"sample: {config.prompt}")]
    if video.images_BHWC is not None:
        image_THWC = np.asarray(video.images_BHWC[:1])
        rows.insert(0, StripRow(frames_THWC=image_THWC, label="image", captions=["condition"]))
    write_comparison(strip, rows)
    if config.latents is not None:
        atomic_write_bytes(config.latents, save({"latents_BCTHW": video.latents_BCTHW.contiguous()}))
    logger.info("wrote %s and %s", config.output, strip)
    return config.output, strip
