"""``sample(config)``: one video from an image and a prompt, alone or as one of a launcher's processes."""

from __future__ import annotations

import logging
import os

import torch

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.parallel.replicas import divide_replicas
from megatron_flashi2v.parallel.world import world
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.runtime.progress import progress
from megatron_flashi2v.sampling.image import load_image
from megatron_flashi2v.sampling.noise import NoiseFile
from megatron_flashi2v.sampling.outputs import files_of_one, require_outputs, write_files
from megatron_flashi2v.sampling.pipeline import SampledVideo
from megatron_flashi2v.sampling.session import (
    Encoders,
    Source,
    call_options,
    load_pipeline,
    require_processes,
    require_prompts,
    video_shape,
)

logger = logging.getLogger(__name__)


def sample(config: SampleConfig) -> SampledVideo:
    """Load everything, sample one video, and write the mp4 and the strip of frames (on rank 0).

    Every process that a launcher started calls it alike; they divide the model.

    Args:
        config: such as ``SampleConfig.from_flags(load="runs/tiny", image="cat.png", prompt="...", ...)``; without
            ``requests``, which are for :func:`~megatron_flashi2v.sampling.many.sample_requests`.

    Raises:
        UserError: a file, a checkpoint or a setting is wrong.
    """
    if config.prompt is None:
        raise ConfigError("sample() makes one video of image and prompt; call sample_requests() for requests")
    launch = detect_launch(os.environ)
    with logging_to_stderr(launch.rank):
        return _sample(config, config.prompt, launch)


def _sample(config: SampleConfig, prompt: str, launch: LaunchEnvironment) -> SampledVideo:
    # Cheap checks first: nobody should wait for 14 billion weights to hear of a misspelt file.
    require_outputs(config)
    source = Source.find(config)
    require_prompts(source.model, prompt, source.negative_prompt)
    require_processes(config, source.model, launch)
    shape = video_shape(config, source.state)
    image = condition_image(config, source.model)
    encoders = Encoders.load(config, source, launch)
    latent_shape = encoders.latent_shape(source.model, shape)
    noise = None
    if config.noise is not None:
        file = NoiseFile(config.noise)
        noise = file.read(file.find(None, latent_shape))
    logger.info(
        "sampling %d frames of %dx%d from %s on %s", shape.num_frames, shape.height, shape.width, source.folder,
        encoders.device.describe(),
    )
    with world(encoders.device, launch, config.parallel) as groups:
        replica = divide_replicas(
            groups, config.guidance_parallel_size, config.parallel.distributed_timeout_minutes
        )
        pipeline = load_pipeline(config, source, encoders, groups, replica)
        with progress("sampling", config.sampler.num_steps, rank=launch.rank) as report:
            video = pipeline(
                image, prompt, **call_options(config, shape), negative_prompt=source.negative_prompt,
                seed=config.seed, noise_BCTHW=noise, decode=replica.is_first,
                callback=lambda done, steps, state: report.advance(),
            )
    if replica.is_first:
        files = files_of_one(config)
        write_files(video, files, prompt, shape.fps, enlarge=config.enlarge)
        logger.info("wrote %s and %s", files.video, files.strip)
    return video


def condition_image(config: SampleConfig, model_config: ModelConfig) -> torch.Tensor | None:
    """The condition image as a uint8 tensor ``[3, H, W]``; None for a text-to-video model without one.

    Raises:
        ConfigError: the model needs an image and none was given.
        DataError: the file is missing, or no picture or video.
    """
    if config.image is not None:
        return load_image(config.image)
    if paradigm_of(model_config).uses_image:
        raise ConfigError(
            f"image is not given, but {config.load} is a {model_config.conditioning} model; give --image FILE"
        )
    return None
