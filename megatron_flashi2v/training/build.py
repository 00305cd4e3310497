"""Builds what training changes: weights, optimizer and average, from a checkpoint or anew."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch.distributed

from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.adapter import adapter_of
from megatron_flashi2v.config.layout import is_fully_sharded, virtual_stages
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.rules import num_microbatches
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.conversion.adapters.initial import load_initial_adapter, open_initial_adapter
from megatron_flashi2v.conversion.initial_weights import (
    InitialWeights,
    load_initial_weights,
    open_initial_weights,
)
from megatron_flashi2v.models.build import build_stages
from megatron_flashi2v.models.initialization import initialize_shards
from megatron_flashi2v.models.spec import ModelSpec, make_spec
from megatron_flashi2v.models.weight_shards import WeightShard
from megatron_flashi2v.parallel.fully_sharded import FullyShardedStage
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.placement import shard_grid
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.hang_watch import SLOW, HangWatch
from megatron_flashi2v.training.clipping import make_clipper
from megatron_flashi2v.training.ema import WeightAverage
from megatron_flashi2v.training.guard import UpdateGuard
from megatron_flashi2v.training.optimizer import make_optimizer, make_scheduler, wrap_data_parallel
from megatron_flashi2v.training.partial import adapter_record, freeze, require_same_part
from megatron_flashi2v.training.run_state import Provenance
from megatron_flashi2v.training.state import TrainState, all_weights, trained_parameters
from megatron_flashi2v.training.step import TrainingStep

logger = logging.getLogger(__name__)


def spec_of(config: TrainConfig, model: ModelConfig, groups: Groups, device: Device) -> ModelSpec:
    """The spec of the stages of a run.

    Args:
        config: precision, kernels and layout.
        model: dimensions, as the data fit them.
        groups: of the configuration's layout.
        device: where the model lives.

    Raises:
        ConfigError: the attention backend cannot run here, Transformer Engine is missing, or a target of adapters
            names no linear.
    """
    runtime = config.runtime
    return make_spec(
        model, groups, device.torch_device, bf16=config.batch.bf16,
        fp32_residual_connection=config.batch.fp32_residual_connection,
        attention_backend=runtime.attention_backend, virtual_stages=virtual_stages(config.parallel),
        backend=runtime.backend,
        adapter=adapter_of(config.adapter, has_image_branch=paradigm_of(model).image_rows(model) > 0),
    )


def build_state(
    config: TrainConfig,
    spec: ModelSpec,
    resumed: Path | None,
    provenance: Provenance,
    peers: Peers,
    hang_watch: HangWatch,
    before_reduction: Callable[[], None],
) -> TrainState:
    """Build this rank's part of a run: as the checkpoint has it, or with initial weights.

    The order bears load. Initial weights come after data parallelism, which makes the memory of sharded ones, and
    before the optimizer, which copies what it finds into its fp32 masters, and the average, which begins as these; a
    checkpoint comes after both, as it fills all three. Frozen weights are so before data parallelism, which makes
    gradients for the others alone; no checkpoint of the run holds them.

    Args:
        config: flags and recipe, checked.
        spec: dimensions, precision, groups and kernels of the stages.
        resumed: the checkpoint to go on from; None starts anew.
        provenance: of this run.
        peers: all ranks.
        hang_watch: enters a phase for each part that takes long.
        before_reduction: called when an iteration's gradients are about to be reduced over replicas.

    Raises:
        UserError: the checkpoint or the initial weights do not fit the model, or are damaged.
    """
    hang_watch.enter("building the model", SLOW)
    frozen = config.adapter.is_partial
    initial = _initial_weights(config, spec.config, peers) if frozen or resumed is None else None
    record = adapter_record(config, spec, initial, peers) if frozen and initial is not None else None
    start = config.adapter.load_adapter if resumed is None else None
    pairs = None
    if start is not None and record is not None:
        pairs = open_initial_adapter(start, spec.config, record, peers)
    if resumed is not None:
        require_same_part(resumed, record)
    if resumed is not None and record is not None:
        logger.info("frozen weights are those of %s", record.base)
    elif initial is not None:
        logger.info("%s", initial.summary)
    if pairs is not None:
        logger.info("%s", pairs.summary)
    world_size = torch.distributed.get_world_size()
    stages = build_stages(spec, config.parallel, config.recompute, hollow=is_fully_sharded(config.parallel, world_size))
    if record is not None:
        freeze(stages, record.trained)
    models = wrap_data_parallel(stages, config.parallel, before_reduction)
    if frozen or resumed is None:
        weights = all_weights(stages, models)
        set_initial_weights(weights, spec.config, initial, config.batch.seed)
        if pairs is not None:
            load_initial_adapter(pairs, weights)
        for model in models:
            if isinstance(model, FullyShardedStage):
                model.take_weights()
    hang_watch.enter("building the optimizer", SLOW)
    optimizer = make_optimizer(models, config.optimizer, config.parallel, spec)
    decay = config.optimizer.ema_decay
    state = TrainState(
        provenance=provenance, stages=stages, models=models, optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config.optimizer, config.batch.train_iters),
        clipper=make_clipper(config.optimizer), guard=UpdateGuard(config.faults),
        average=None if decay is None else WeightAverage(
            config.optimizer, optimizer, trained_parameters(stages), shard_grid(spec.groups)
        ),
        adapter=record,
        gathers_late=config.parallel.overlap_param_gather,
    )
    if resumed is not None:
        hang_watch.enter("loading the checkpoint", SLOW)
        state.resume(resumed)
    return state


def build_step(config: TrainConfig, state: TrainState, world_size: int) -> TrainingStep:
    """The forward, backward and update of one iteration.

    Args:
        config: the batch.
        state: what the step changes.
        world_size: number of processes, which share the global batch.
    """
    return TrainingStep(
        state.spec, state.stages, state.models, state.optimizer, state.clipper,
        num_microbatches=num_microbatches(config, world_size), micro_batch_size=config.batch.micro_batch_size,
    )


def _initial_weights(config: TrainConfig, model: ModelConfig, peers: Peers) -> InitialWeights | None:
    """Those of --load-weights, opened."""
    source = config.checkpoint.load_weights_source
    if source is None:
        return None
    return open_initial_weights(source, model, config.checkpoint.load_weights_kind, peers)


def set_initial_weights(
    shards: list[WeightShard], model: ModelConfig, initial: InitialWeights | None, seed: int
) -> None:
    """Take the weights that ``initial`` has, and draw the others.

    Raises:
        CheckpointError: a file is damaged.
    """
    given = frozenset[str]() if initial is None else initial.given_whole
    initialize_shards((shard for shard in shards if shard.name not in given), model, seed)
    if initial is not None:
        load_initial_weights(initial, shards)
