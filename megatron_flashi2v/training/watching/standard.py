"""The observers of every run; the user's own stand between the two lists."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed

from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.parallel.agreement import share_json
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.training.batch import MICROBATCHES_AHEAD, MicrobatchSource
from megatron_flashi2v.training.metrics import ProgressLine
from megatron_flashi2v.training.state import TrainState
from megatron_flashi2v.training.step import TrainingStep
from megatron_flashi2v.training.watching.norms import NormsByPart
from megatron_flashi2v.training.watching.observer import Observer, Run
from megatron_flashi2v.training.watching.previews import Previews, preview_folder
from megatron_flashi2v.training.watching.profiling import Profiling
from megatron_flashi2v.training.watching.schedule import Schedule
from megatron_flashi2v.training.watching.stragglers import ReplicaClock, StragglerWatch
from megatron_flashi2v.training.watching.throughput import ThroughputMeter, ThroughputWatch
from megatron_flashi2v.training.watching.validation import Validation, validation_source
from megatron_flashi2v.training.watching.videos import ValidationVideos
from megatron_flashi2v.training.watching.writers import VALIDATION, Writers


def figure_observers(
    config: TrainConfig, state: TrainState, source: MicrobatchSource, device: Device, clock: ReplicaClock
) -> list[Observer]:
    """Those that measure, and add figures to rows; collective.

    Args:
        config: flags and recipe, checked.
        state: of this rank.
        source: reads this replica's samples.
        device: what this rank runs on.
        clock: this replica's.
    """
    watch, spec = config.watch, state.spec
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    fp8 = config.runtime.backend.fp8_format is not None
    meter = ThroughputMeter(
        config.batch, spec.config, device, world_size, fp8=fp8, frozen=config.adapter.is_partial
    )
    found: list[Observer] = [
        Profiling(watch, config.checkpoint.save, device, rank),
        ThroughputWatch(meter, source, spec.groups),
        StragglerWatch(spec.groups, device, clock),
    ]
    if watch.log_norms_interval is not None:
        found.append(NormsByPart(spec.config, watch.log_norms_interval, spec.device))
    return found


def recording_observers(
    config: TrainConfig,
    state: TrainState,
    step: TrainingStep,
    validation_data: Blend | None,
    device: Device,
    begin_part: Callable[[str], bool],
    user: Observer,
) -> list[Observer]:
    """Those that use validation data, and those that write; collective.

    Files are opened last, when nothing can be refused any more.

    Args:
        config: flags and recipe, checked.
        state: where the run begins.
        step: runs the model.
        validation_data: what is not trained on; None without any.
        device: what this rank runs on.
        begin_part: see :meth:`~megatron_flashi2v.training.interrupts.LongWork.begin_part`.
        user: the user's observers, which begin here.

    Raises:
        ConfigError: the VAE of previews cannot be loaded, or is not that of the data.
        UserError: an observer of the user's refuses the run.
    """
    watch, save, spec, train_iters = config.watch, config.checkpoint.save, state.spec, config.batch.train_iters
    found: list[Observer] = []
    videos = None
    if validation_data is not None and (watch.sample_interval or watch.evaluation_interval):
        videos = ValidationVideos(watch, validation_data, spec.config, spec.groups, device, begin_part)
    if watch.sample_interval is not None and save is not None and videos is not None:
        made = share_json(preview_folder(save, state.iteration).exists())
        schedule = Schedule(watch.sample_interval, train_iters, done_at=state.iteration if made else None)
        found.append(Previews(videos, watch.sample_vae, save, device, schedule))
    user.begin_run(Run(
        config=config, device=device, videos=videos, begin_part=begin_part,
        record=lambda kind, row: writers.write(kind, row),
        last_recorded=lambda kind: share_json(writers.last_iteration(kind)),
    ))
    writers = Writers(config, state.iteration, writes=torch.distributed.get_rank() == 0)
    if watch.eval_interval is not None and validation_data is not None:
        source = validation_source(validation_data, spec.config, config.data, config.batch, step,
                                   iterations=watch.eval_iters, ahead=MICROBATCHES_AHEAD)
        done_at = share_json(writers.last_iteration(VALIDATION))
        found.insert(0, Validation(
            source, step, watch.eval_iters, Schedule(watch.eval_interval, train_iters, done_at), begin_part,
            record=lambda row: writers.write(VALIDATION, row),
        ))
    return [*found, writers, ProgressLine(train_iters, config.runtime.log_interval)]
