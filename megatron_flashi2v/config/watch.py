"""The flags of ``flashi2v train`` by which people look at a run, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_flashi2v.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WatchArguments:
    """Looking at a run; none of it changes what is trained."""

    log_norms_interval: int | None = None
    """Iterations between rows with norms of gradients and parameters by part of the model; by default never."""
    eval_interval: int | None = None
    """Iterations between evaluations of the loss on --valid-data-path, at fixed sigmas and noise; by default never."""
    eval_iters: int = 10
    """Global batches of one evaluation, always the same ones."""
    valid_data_path: tuple[str, ...] = ()
    """Folder written by `flashi2v prepare` that is not trained on, or several, each after its weight."""
    sample_interval: int | None = None
    """Iterations between videos that the model makes of the first images of --valid-data-path; by default never."""
    sample_count: int = 2
    """Videos made each time, under --save in samples/."""
    sample_num_steps: int = 20
    """Euler steps of each."""
    sample_guidance_scale: float = 5.0
    """Classifier-free guidance against the empty prompt; 1 turns it off and halves the time."""
    sample_vae: Path | None = None
    """VAE that makes mp4 and strips of frames of them; without it their latents are written."""
    profile: bool = False
    """Write profiler traces of some iterations to traces/ under --save; `touch SAVE/profile` does so at any time."""
    profile_step_start: int = 10
    """The trace begins when so many iterations are done."""
    profile_step_end: int = 12
    """The trace ends when so many iterations are done; one on demand is as long."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that write traces."""
    tensorboard_dir: Path | None = None
    """Folder for TensorBoard's event files."""
    wandb_project: str | None = None
    """Project at Weights & Biases; its own variables (WANDB_MODE, WANDB_NAME, WANDB_ENTITY ...) say the rest."""


def check_watch(watch: WatchArguments, save: Path | None, world_size: int) -> None:
    """Check everything that needs no data.

    Args:
        watch: the flags.
        save: ``--save``.
        world_size: processes that were started.

    Raises:
        ConfigError: a rule is broken.
    """
    for name in ("log_norms_interval", "eval_interval", "eval_iters", "sample_interval", "sample_count",
                 "sample_num_steps"):
        value = getattr(watch, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not watch.sample_guidance_scale >= 0:
        raise ConfigError(f"--sample-guidance-scale is {watch.sample_guidance_scale}; it must be at least 0")
    _check_validation_data(watch)
    if watch.sample_interval is not None and save is None:
        raise ConfigError("--sample-interval writes its videos under --save, which is not set; give a folder")
    if watch.sample_vae is not None and watch.sample_interval is None:
        raise ConfigError(f"--sample-vae {watch.sample_vae} is of no use without --sample-interval; add it")
    _check_profile(watch, save, world_size)


def _check_validation_data(watch: WatchArguments) -> None:
    intervals = {"--eval-interval": watch.eval_interval, "--sample-interval": watch.sample_interval}
    for flag, interval in intervals.items():
        if interval is not None and not watch.valid_data_path:
            raise ConfigError(
                f"{flag} {interval} needs --valid-data-path: what is trained on would show nothing; give data that are "
                "not"
            )
    if watch.valid_data_path and not any(intervals.values()):
        raise ConfigError(
            f"--valid-data-path {' '.join(watch.valid_data_path)} is of no use without {' or '.join(intervals)}; add "
            "one of them"
        )


def _check_profile(watch: WatchArguments, save: Path | None, world_size: int) -> None:
    if watch.profile and save is None:
        raise ConfigError("--profile writes its traces under --save, which is not set; give a folder")
    if not 0 <= watch.profile_step_start < watch.profile_step_end:
        raise ConfigError(
            f"--profile-step-start {watch.profile_step_start} and --profile-step-end {watch.profile_step_end} must be "
            "in order, from 0 on"
        )
    strange = [rank for rank in watch.profile_ranks if not 0 <= rank < world_size]
    if strange:
        raise ConfigError(f"--profile-ranks names rank {strange[0]}; {world_size} processes have 0 to {world_size - 1}")
