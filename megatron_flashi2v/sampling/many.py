"""``sample_requests(config)``: many videos from a file of requests, divided over the replicas of the model.

Each video is made alone, from noise keyed by its seed and its request's id: neither the division nor an interruption
changes it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import ConfigError, DataError, UserError
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.parallel.agreement import first_failure, share_json
from megatron_flashi2v.parallel.replicas import Replica, divide_replicas, own_pace
from megatron_flashi2v.parallel.world import world
from megatron_flashi2v.runtime.files import require_writable
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.runtime.progress import progress
from megatron_flashi2v.sampling.image import load_image
from megatron_flashi2v.sampling.noise import NoiseFile
from megatron_flashi2v.sampling.outputs import files_of_named, write_files
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline
from megatron_flashi2v.sampling.record import PlannedVideo, begin, deciding_settings
from megatron_flashi2v.sampling.requests import Job, plan_jobs, read_requests
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


def sample_requests(config: SampleConfig) -> list[Path]:
    """Make the videos of ``config.requests`` that are not in the folder ``config.output`` yet.

    Every process that a launcher started calls it alike.

    Args:
        config: such as ``SampleConfig.from_flags(load="runs/tiny", requests="requests.jsonl", output="videos", ...)``.

    Returns:
        The mp4 of every video, in the order of the requests and their seeds.

    Raises:
        UserError: a request, a file, a checkpoint or a setting is wrong; told before the first video is made.
    """
    if config.requests is None:
        raise ConfigError("sample_requests() makes the videos of requests, which are not given; sample() makes one")
    launch = detect_launch(os.environ)
    with logging_to_stderr(launch.rank):
        return _sample_requests(config, config.requests, launch)


def _sample_requests(config: SampleConfig, requests: Path, launch: LaunchEnvironment) -> list[Path]:
    # Cheap checks first, as for one video.
    jobs = plan_jobs(read_requests(requests), config.name, config.seed)
    require_writable(config.output, "--output", folder=True)
    source = Source.find(config)
    require_processes(config, source.model, launch)
    if paradigm_of(source.model).uses_image:
        _require_images(requests, jobs, source)
    videos = _plan(config, source, jobs)
    _require_prompts(requests, videos, source)
    encoders = Encoders.load(config, source, launch)
    noise = None if config.noise is None else NoiseFile(config.noise)
    _require_sizes(requests, videos, encoders, source, noise)
    with world(encoders.device, launch, config.parallel) as groups:
        _require_pictures(requests, videos[launch.rank :: launch.world_size])
        missing = _begin(config, source, videos, is_first=launch.rank == 0)
        replica = divide_replicas(
            groups, config.guidance_parallel_size, config.parallel.distributed_timeout_minutes
        )
        logger.info(
            "sampling %d of %d videos from %s on %s; replicas: %d", len(missing), len(videos), source.folder,
            encoders.device.describe(), replica.count,
        )
        if missing:
            pipeline = load_pipeline(config, source, encoders, groups, replica)
            with progress(
                "sampling", len(videos), initial=len(videos) - len(missing), unit="videos", rank=launch.rank
            ) as report:
                left = _by_prompt([videos[place] for place in missing])
                with own_pace():
                    for video in replica.share(left):
                        _make(pipeline, video, config, noise, replica)
                        if launch.rank == 0:
                            before, left = left, [one for one in left if not one.files.video.exists()]
                            report.advance(len(before) - len(left))
                report.advance(len(left))
    return [video.files.video for video in videos]


def _plan(config: SampleConfig, source: Source, jobs: Sequence[Job]) -> list[PlannedVideo]:
    return [
        PlannedVideo(
            job=job,
            shape=video_shape(config, source.state, job.request),
            files=files_of_named(config, job.name),
            negative_prompt=(
                source.negative_prompt if job.request.negative_prompt is None else job.request.negative_prompt
            ),
        )
        for job in jobs
    ]


def _require_images(requests: Path, jobs: Sequence[Job], source: Source) -> None:
    for job in jobs:
        if job.request.image is None:
            raise DataError(
                f"{requests}: line {job.request.line}: id {job.request.id!r} has no image, but {source.folder} is a "
                f"{source.model.conditioning} model; give one"
            )


def _require_prompts(requests: Path, videos: Sequence[PlannedVideo], source: Source) -> None:
    """Refuse prompts that text cleaning empties."""
    for video in videos:
        try:
            require_prompts(source.model, video.job.request.prompt, video.negative_prompt)
        except ConfigError as error:
            raise ConfigError(f"{requests}: line {video.job.request.line}: {error}") from None


def _require_sizes(
    requests: Path, videos: Sequence[PlannedVideo], encoders: Encoders, source: Source, noise: NoiseFile | None
) -> None:
    """Refuse sizes that do not fit the models, and noise of other sizes than the videos'."""
    for video in videos:
        try:
            latent_shape = encoders.latent_shape(source.model, video.shape)
        except ConfigError as error:
            raise ConfigError(f"{requests}: line {video.job.request.line}: {error}") from None
        if noise is not None:
            noise.find(video.job.name, latent_shape)


def _require_pictures(requests: Path, videos: Sequence[PlannedVideo]) -> None:
    """Refuse files that are no pictures; all ranks look, each at its share."""
    error: UserError | None = None
    lines = {video.job.request.image: video.job.request.line for video in videos}
    for image, line in lines.items():
        try:
            if image is not None:
                load_image(image)
        except UserError as caught:
            error = DataError(f"{requests}: line {line}: {caught}")
            break
    _agree(error)


def _begin(config: SampleConfig, source: Source, videos: Sequence[PlannedVideo], *, is_first: bool) -> list[int]:
    """Places of the videos that are to make, as the first rank finds them before any rank makes one."""
    error: UserError | None = None
    missing: list[int] = []
    if is_first:
        try:
            missing = begin(config.output, deciding_settings(config, source), videos)
        except UserError as caught:
            error = caught
    _agree(error)
    return share_json(missing)


def _agree(error: UserError | None) -> None:
    failure = first_failure(error)
    if failure is not None:
        raise DataError(failure.message) from error


def _by_prompt(videos: Sequence[PlannedVideo]) -> list[PlannedVideo]:
    """The videos of one prompt together, so that each prompt's rows are made once; else in their order."""
    order: dict[tuple[str, str], int] = {}
    for video in videos:
        order.setdefault((video.negative_prompt, video.job.request.prompt), len(order))
    return sorted(videos, key=lambda video: order[video.negative_prompt, video.job.request.prompt])


def _make(
    pipeline: ImageToVideoPipeline, video: PlannedVideo, config: SampleConfig, noise: NoiseFile | None, replica: Replica
) -> None:
    """Sample one video, and write it on the replica's first rank."""
    job = video.job
    sampled = pipeline(
        job.request.image, job.request.prompt, **call_options(config, video.shape),
        negative_prompt=video.negative_prompt, seed=job.seed, keys=[job.request.id],
        noise_BCTHW=None if noise is None else noise.read(job.name), decode=replica.is_first,
    )
    if replica.is_first:
        write_files(sampled, video.files, job.request.prompt, video.shape.fps, enlarge=config.enlarge)
