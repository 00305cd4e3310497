"""The parts of a run, built in the order in which they need one another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.hang_watch import SLOW, HangWatch
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.training.announcement import announce
from megatron_flashi2v.training.build import build_state, build_step, spec_of
from megatron_flashi2v.training.checkpoints import RunCheckpoints
from megatron_flashi2v.training.datasets import opened_data
from megatron_flashi2v.training.interrupts import Interrupts, LongWork
from megatron_flashi2v.training.partial import picked_tensors
from megatron_flashi2v.training.reading import bad_sample_ledger, training_source
from megatron_flashi2v.training.run_folder import choose_start
from megatron_flashi2v.training.run_state import provenance_of
from megatron_flashi2v.training.saver import CheckpointSaver
from megatron_flashi2v.training.trainer import Trainer
from megatron_flashi2v.training.watching.observer import Observer, Observers
from megatron_flashi2v.training.watching.standard import figure_observers, recording_observers
from megatron_flashi2v.training.watching.stragglers import ReplicaClock


@contextlib.contextmanager
def open_trainer(
    config: TrainConfig,
    model: ModelConfig,
    groups: Groups,
    launch: LaunchEnvironment,
    device: Device,
    hang_watch: HangWatch | None = None,
    observers: Sequence[Observer] = (),
) -> Iterator[Trainer]:
    """Open the data, build or resume this rank's part of a run, and announce it; on the way out, close all of it.

    All ranks enter it together, inside :func:`~megatron_flashi2v.parallel.world.world`.

    Args:
        config: flags and recipe, checked by ``config.rules.check_train``.
        model: resolved dimensions.
        groups: of the configuration's layout.
        launch: this process's place.
        device: what it runs on.
        hang_watch: enters the phases of the run; by default nothing is watched.
        observers: the user's own.

    Raises:
        UserError: the data or the checkpoint does not fit the configuration.
    """
    hang_watch = hang_watch or HangWatch(0.0, None, launch, gather_json)
    interrupts = Interrupts(config.checkpoint.exit_duration_minutes)
    with opened_data(config, model, groups, device.torch_device) as data:
        peers = Peers(launch.rank, launch.world_size)
        # What needs no checkpoint is refused before --fresh sets one aside.
        spec = spec_of(config, data.model, groups, device)
        picked_tensors(config.adapter.train_only, data.model)
        hang_watch.enter("verifying the checkpoint", SLOW)
        start = choose_start(config, peers)
        provenance = provenance_of(config, data.training, launch, started_from=start.started_from)
        start.require_same_run(data.model, provenance)
        clock = ReplicaClock(device)
        state = build_state(config, spec, start.checkpoint, provenance, peers, hang_watch, clock.meet)
        data.training.require_whole_batches(state.consumed_samples)
        step = build_step(config, state, launch.world_size)
        source = training_source(config, data.training, state, step)
        begin_part = LongWork(interrupts, hang_watch).begin_part
        user = Observers(observers)
        watching = Observers([
            *figure_observers(config, state, source, device, clock),
            user,
            *recording_observers(config, state, step, data.validation, device, begin_part, user),
        ])
        with contextlib.closing(state), contextlib.closing(watching):
            announce(config, state, data.training, launch, device, num_microbatches=step.num_microbatches)
            saver = CheckpointSaver(config.checkpoint, data.model, peers, device, state.adapter)
            yield Trainer(
                state=state, step=step, source=source, bad_samples=bad_sample_ledger(config, state, source),
                observers=watching, checkpoints=RunCheckpoints(config.checkpoint, state, saver, hang_watch),
                saver=saver, interrupts=interrupts, hang_watch=hang_watch, device=device,
                train_iters=config.batch.train_iters, exit_interval=config.checkpoint.exit_interval,
            )
