"""The flags of ``flashi2v train`` by which people look at a run, and the rules that cross them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_flashi2v.config.bounds import AtLeast
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import HoldsPath


@dataclass(frozen=True, kw_only=True)
class WatchArguments:
    """Logs, validation, previews and traces, which change nothing that is trained."""

    log_norms_interval: Annotated[int | None, AtLeast(1)] = None
    """Iterations between rows with norms of gradients and parameters by part of the model; by default never."""
    eval_interval: Annotated[int | None, AtLeast(1)] = None
    """Iterations between evaluations of the loss on --valid-data-path, at fixed sigmas and noise; by default never."""
    eval_iters: Annotated[int, AtLeast(1)] = 10
    """Global batches of one evaluation, always the same ones."""
    valid_data_path: Annotated[tuple[str, ...], HoldsPath()] = ()
    """Folder that `flashi2v prepare` wrote and that is not trained on, or several, each after its weight."""
    sample_interval: Annotated[int | None, AtLeast(1)] = None
    """Iterations between previews: videos sampled from the first images of --valid-data-path; by default never."""
    sample_count: Annotated[int, AtLeast(1)] = 2
    """Videos each time: previews lie under --save in samples/."""
    sample_num_steps: Annotated[int, AtLeast(1)] = 20
    """Euler steps of each preview."""
    sample_guidance_scale: Annotated[float, AtLeast(0)] = 5.0
    """Classifier-free guidance against the empty prompt; 1 turns it off and halves the time."""
    sample_vae: Path | None = None
    """VAE that decodes previews to mp4 and strips of frames; without it their latents are written."""
    evaluation_interval: Annotated[int | None, AtLeast(1)] = None
    """Iterations between measures of videos that are sampled as previews are: fidelity to the image, and motion beside
    the validation clips'; under --save in evaluation/. By default never."""
    profile: bool = False
    """Write profiler traces of some iterations to traces/ under --save; `touch SAVE/profile` does so at any time."""
    profile_step_start: Annotated[int, AtLeast(0)] = 10
    """Iterations done when the trace begins."""
    profile_step_end: Annotated[int, AtLeast(1)] = 12
    """Iterations done when the trace ends; a trace on demand is as long."""
    profile_ranks: tuple[Annotated[int, AtLeast(0)], ...] = (0,)
    """Ranks that write traces."""
    tensorboard_dir: Path | None = None
    """Folder for TensorBoard's event files."""
    wandb_project: str | None = None
    """Project at Weights & Biases, which reads its other settings from WANDB_MODE, WANDB_NAME, WANDB_ENTITY ..."""


def check_watch(watch: WatchArguments, save: Path | None, world_size: int) -> None:
    """Check the rules that cross flags.

    Args:
        watch: the flags.
        save: ``--save``.
        world_size: processes that were started.

    Raises:
        ConfigError: a rule is broken.
    """
    _check_validation_data(watch)
    if watch.sample_interval is not None and save is None:
        raise ConfigError("--sample-interval writes its videos under --save, which is not set; give a folder")
    _check_evaluation(watch, save)
    if watch.sample_vae is not None and watch.sample_interval is None and watch.evaluation_interval is None:
        raise ConfigError(
            f"--sample-vae {watch.sample_vae} requires --sample-interval or --evaluation-interval; add one of them"
        )
    _check_profile(watch, save, world_size)


def _check_validation_data(watch: WatchArguments) -> None:
    intervals = {
        "--eval-interval": watch.eval_interval, "--sample-interval": watch.sample_interval,
        "--evaluation-interval": watch.evaluation_interval,
    }
    for flag, interval in intervals.items():
        if interval is not None and not watch.valid_data_path:
            raise ConfigError(
                f"{flag} {interval} needs --valid-data-path; give data that are not trained on"
            )
    if watch.valid_data_path and not any(intervals.values()):
        raise ConfigError(
            f"--valid-data-path {' '.join(watch.valid_data_path)} requires {' or '.join(intervals)}; add one of them"
        )


def _check_evaluation(watch: WatchArguments, save: Path | None) -> None:
    given = f"--evaluation-interval {watch.evaluation_interval}"
    if watch.evaluation_interval is None:
        return
    if save is None:
        raise ConfigError(f"{given} writes its measures under --save, which is not set; give a folder")
    if watch.sample_vae is None:
        raise ConfigError(f"{given} measures decoded videos; give --sample-vae, the VAE that prepared the data")


def _check_profile(watch: WatchArguments, save: Path | None, world_size: int) -> None:
    if watch.profile and save is None:
        raise ConfigError("--profile writes its traces under --save, which is not set; give a folder")
    if watch.profile_step_start >= watch.profile_step_end:
        raise ConfigError(
            f"--profile-step-start {watch.profile_step_start} and --profile-step-end {watch.profile_step_end} must be "
            "in order"
        )
    strange = [rank for rank in watch.profile_ranks if rank >= world_size]
    if strange:
        raise ConfigError(f"--profile-ranks names rank {strange[0]}; {world_size} processes have 0 to {world_size - 1}")
