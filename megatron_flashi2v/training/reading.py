"""What reads a run's samples on this rank, and what records those that cannot be used."""

from __future__ import annotations

from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.training.bad_samples import BadSampleLedger
from megatron_flashi2v.training.batch import MICROBATCHES_AHEAD, MicrobatchSource
from megatron_flashi2v.training.state import TrainState
from megatron_flashi2v.training.step import TrainingStep


def training_source(config: TrainConfig, data: Blend, state: TrainState, step: TrainingStep) -> MicrobatchSource:
    """The source of this replica's microbatches, up to the run's end or the exit that --exit-interval asks for."""
    groups, last, interval = state.spec.groups, config.batch.train_iters, config.checkpoint.exit_interval
    if interval is not None:
        last = min(last, (state.iteration // interval + 1) * interval)
    return MicrobatchSource(
        data, state.spec.config, config.data, config.batch, dp_rank=groups.dp.rank(), dp_size=groups.dp.size(),
        device=state.spec.device, shapes_only=step.reading_stage is None,
        ahead=step.num_microbatches if data.encodes_together else MICROBATCHES_AHEAD,
        end=state.consumed_samples + (last - state.iteration) * step.samples,
    )


def bad_sample_ledger(config: TrainConfig, state: TrainState, source: MicrobatchSource) -> BadSampleLedger:
    """The ledger of samples that cannot be used, which goes on where the run does; collective."""
    return BadSampleLedger(
        config.checkpoint.save, config.data.max_bad_samples, consumed=state.consumed_samples, replica=source.dp_rank,
        reads=not source.shapes_only,
    )
