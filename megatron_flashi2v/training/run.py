"""``train(config)``: a training run from Python, alone or as one of a launcher's processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.hccl import parse_buffer_sizes
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.rules import check_train, hang_timeout_s
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.runtime.launch import LaunchEnvironment, detect_launch
from megatron_flashi2v.runtime.logging import logging_to_stderr

if TYPE_CHECKING:
    from megatron_flashi2v.training.trainer import Trainer
    from megatron_flashi2v.training.watching.observer import Observer


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run has come to, the same on all ranks.

    Attributes:
        iteration: iterations done, of this run and those that it resumed.
        metrics: row of the last iteration, as in metrics.jsonl; None where none was left to do.
        checkpoint: folder of the last iteration's checkpoint; None without ``save``.
    """

    iteration: int
    metrics: dict[str, Any] | None
    checkpoint: Path | None


def train(config: TrainConfig, observers: Sequence[Observer] = ()) -> TrainResult:
    """Train, or go on with a run that was interrupted.

    Every process that torchrun, msrun or srun started calls it alike; without a launcher this process trains alone.
    Progress is logged to standard error. Afterwards the process is as before, so it can train again, also after an
    error (not so with HCCL and several processes, nor with MindSpeed).

    Args:
        config: everything that the run depends on, such as ``TrainConfig.from_recipe("recipe.yaml", lr=1e-4)``.
        observers: :class:`~megatron_flashi2v.training.watching.observer.Observer` of the user's, the same on all ranks.

    Raises:
        UserError: the configuration, the data or a checkpoint cannot be used; the message names the flag or the file.
    """
    require_served(config, observers)
    if config.runtime.dry_run:
        raise ConfigError("--dry-run is on, which plans a run with `flashi2v train` and trains nothing; turn it off")
    launch, model = detect_launch(os.environ), resolve_model(config.model)
    if launch.is_scheduler:  # msrun starts the script once more, for a process that does not train
        return TrainResult(iteration=0, metrics=None, checkpoint=None)
    check_train(config, model, launch.world_size)
    # It imports torch, which a command's --help must not.
    from megatron_flashi2v.conditioning.build import paradigm_of
    from megatron_flashi2v.training.watching.writers import require_packages

    paradigm_of(model)  # refuses an unknown --conditioning
    if launch.rank == 0:
        require_packages(config.watch)
    with logging_to_stderr(launch.rank), entered_run(config, model, launch, observers) as trainer:
        row = trainer.train()
        return TrainResult(
            iteration=trainer.state.iteration, metrics=row, checkpoint=trainer.checkpoints.published
        )


def require_served(config: TrainConfig, observers: Sequence[Observer]) -> None:
    """Refuse flags that have no effect without an observer that ``flashi2v train`` brings and Python code may forget.

    Raises:
        ConfigError: names the flag and the observer.
    """
    flag = "--evaluation-interval"
    if config.watch.evaluation_interval is not None and all(observer.serves != flag for observer in observers):
        raise ConfigError(
            f"{flag} {config.watch.evaluation_interval} is served by an observer: call "
            "train(config, observers=[megatron_flashi2v.EvaluationInTraining()])"
        )


@contextlib.contextmanager
def entered_run(
    config: TrainConfig, model: ModelConfig, launch: LaunchEnvironment, observers: Sequence[Observer] = ()
) -> Iterator[Trainer]:
    """Resolve the device, enter the world and open the trainer; on the way out all of it is undone.

    Args:
        config: flags and recipe, checked.
        model: resolved dimensions.
        launch: this process's place.
        observers: the user's own.

    Raises:
        UserError: as for :func:`train`.
    """
    from megatron_flashi2v.runtime.determinism import deterministic_algorithms
    from megatron_flashi2v.runtime.device import resolve_device
    from megatron_flashi2v.runtime.hang_watch import HangWatch

    parallel = config.parallel
    device = resolve_device(
        config.runtime.device, launch.local_rank, backend=parallel.distributed_backend,
        hccl_buffer_sizes=parse_buffer_sizes(parallel.hccl_buffer_sizes),
    )
    if config.runtime.use_mindspeed:
        from megatron_flashi2v.runtime.mindspeed import load_mindspeed

        load_mindspeed(config)
    # These import megatron-core, which MindSpeed must come before.
    from megatron_flashi2v.parallel.agreement import gather_json
    from megatron_flashi2v.parallel.world import world
    from megatron_flashi2v.training.assembly import open_trainer

    watch = HangWatch(hang_timeout_s(config, launch.world_size), config.checkpoint.save, launch, gather_json)
    timeout_minutes = parallel.distributed_timeout_minutes
    with (
        deterministic_algorithms(config.runtime.deterministic),
        world(device, launch, parallel, timeout_minutes=timeout_minutes, watch=watch) as groups,
        open_trainer(config, model, groups, launch, device, watch, observers) as trainer,
    ):
        yield trainer
