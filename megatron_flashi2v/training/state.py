"""What training changes on this rank, and a checkpoint keeps: weights, optimizer, average, guard, position."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.model_state import load_weights, weight_pieces
from megatron_flashi2v.checkpoint.optimizer_state import (
    common_step,
    load_optimizer,
    optimizer_common_state,
    optimizer_pieces,
)
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.models.weight_shards import WeightShard, held_weights, updated_weights, whole_weights
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.parallel.fully_sharded import FullyShardedStage
from megatron_flashi2v.parallel.placement import ShardGrid, shard_grid
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.training.clipping import Clipper
from megatron_flashi2v.training.ema import WeightAverage
from megatron_flashi2v.training.guard import UpdateGuard
from megatron_flashi2v.training.optimizer import DataParallelStage
from megatron_flashi2v.training.run_state import Provenance, load_training_state, require_model_of, settle_changes

NamedParameters = list[tuple[str, nn.Parameter]]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainState:
    """This rank's part of a run; :func:`~megatron_flashi2v.training.build.build_state` makes it.

    Attributes:
        provenance: what checkpoints say of the run.
        stages: this rank's stages of the model.
        models: the same, each wrapped for data parallelism.
        optimizer: megatron-core's optimizer over them.
        scheduler: its learning rate's schedule, which stands after ``iteration`` iterations.
        clipper: what happens to the gradients before they are applied.
        guard: judges every update.
        average: moving average of the weights; None without --ema-decay.
        adapter: what of the model is trained and saved, where it is not all of it; the rest is frozen.
        gathers_late: whether updated weights are gathered only by the next forward pass of training.
        iteration: iterations done.
        consumed_samples: positions of the global order that are consumed.
    """

    provenance: Provenance
    stages: list[DiffusionTransformer]
    models: list[DataParallelStage]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    clipper: Clipper
    guard: UpdateGuard
    average: WeightAverage | None
    adapter: AdapterRecord | None = None
    gathers_late: bool = False
    iteration: int = 0
    consumed_samples: int = 0

    def close(self) -> None:
        """Let the stages' memory go with them."""
        for model in self.fully_sharded:
            model.close()

    @property
    def spec(self) -> ModelSpec:
        """What the stages are built with."""
        return self.stages[0].spec

    @property
    def grid(self) -> ShardGrid:
        """This rank's place as checkpoints see it."""
        return shard_grid(self.spec.groups)

    def named_parameters(self) -> NamedParameters:
        """Global names and parameters of this rank's stages, of those that are trained."""
        return trained_parameters(self.stages)

    def is_multiple_of(self, interval: int | None) -> bool:
        """Whether the present iteration is a multiple of an interval, if there is one."""
        return interval is not None and self.iteration % interval == 0

    def advance(self, samples: int) -> None:
        """Another iteration, of so many samples, is done: its update was applied or skipped."""
        self.scheduler.step(increment=1)
        self.iteration += 1
        self.consumed_samples += samples

    @property
    def fully_sharded(self) -> list[FullyShardedStage]:
        """The stages whose weights or gradients ranks divide among them: all or none."""
        return [model for model in self.models if isinstance(model, FullyShardedStage)]

    @property
    def gathers_blocks(self) -> bool:
        """Whether every forward pass gathers weights from all replicas, which must then run it together."""
        return any(stage.shards_weights for stage in self.fully_sharded)

    def gather_weights(self) -> None:
        """Let the bare stages compute with the present weights, as only the next forward pass would; collective."""
        for model in self.models:
            if isinstance(model, FullyShardedStage):
                model.gather_weights()
            elif self.gathers_late:
                model.start_param_sync(force_sync=True)

    def settle_weights(self) -> None:
        """Bring the weights that :meth:`pieces` gives up to date; collective where they are gathered late."""
        if not self.fully_sharded:
            self.gather_weights()

    def parameter_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of this tensor-parallel rank's parameters by global name, however replicas divide them."""
        return {shard.name: (shard.box.shape, shard.data.dtype) for shard in all_weights(self.stages, self.models)}

    def written_weights(self) -> list[WeightShard]:
        """This rank's part of the weights in a checkpoint."""
        if self.fully_sharded:
            return updated_weights(self.fully_sharded, self.grid)
        return whole_weights(self.named_parameters(), self.grid)

    def pieces(self) -> list[TensorPiece]:
        """This rank's parts of a checkpoint's tensors; their data share the memory of what is trained."""
        parameters, grid = self.named_parameters(), self.grid
        return [*weight_pieces(self.written_weights()), *optimizer_pieces(self.optimizer, parameters, grid),
                *(self.average.pieces() if self.average else ())]

    def to_json(self) -> dict[str, Any]:
        """The contents of state.json, the same on all ranks; collective."""
        # A rank whose stage trains nothing counts no steps.
        optimizer = common_step(gather_json(optimizer_common_state(self.optimizer)))
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            **self.provenance.to_json(),
            "optimizer": optimizer,
            "clipper": self.clipper.state_dict(),
            "guard": self.guard.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
        }

    def resume(self, folder: Path) -> None:
        """Load weights, optimizer and position from a checkpoint of any layout; frozen weights stay as they are.

        Raises:
            CheckpointError: it is of another model, or damaged.
        """
        require_model_of(folder, self.spec.config)
        state = load_training_state(folder)
        settle_changes(folder, state, self.provenance)
        parameters = self.named_parameters()
        load_weights(folder, trained_weights(self.stages, self.models))
        for stage in self.fully_sharded:
            stage.take_weights()
        load_optimizer(folder, self.optimizer, parameters, self.grid, state.get("optimizer", {}))
        self.iteration, self.consumed_samples = state["iteration"], state["consumed_samples"]
        self._resume_clipper(state.get("clipper"), folder)
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
        if self.average is not None:
            self.average.resume(folder, state.get("ema"))
        elif state.get("ema") is not None:
            logger.warning("%s holds a moving average of the weights, which ends here: there is no --ema-decay", folder,
                           extra=AGREED)
        self.scheduler.step(increment=self.iteration)
        logger.info("resumed from %s at iteration %d", folder, self.iteration)

    def _resume_clipper(self, state: dict[str, Any] | None, folder: Path) -> None:
        """Load the clipper's state; one of another method does not fit, and this run's starts anew."""
        if state is None:
            return
        if state["method"] == self.clipper.method:
            self.clipper.load_state_dict(state)
        else:
            logger.warning("--clip-grad-method is %s, but %s was trained with %s: clipping starts anew",
                           self.clipper.method, folder, state["method"], extra=AGREED)


def named_parameters(stages: list[DiffusionTransformer]) -> NamedParameters:
    """Global names and parameters of all of these stages."""
    return [named for stage in stages for named in stage.named_parameters()]


def trained_parameters(stages: list[DiffusionTransformer]) -> NamedParameters:
    """Those that are not frozen."""
    return [(name, parameter) for name, parameter in named_parameters(stages) if parameter.requires_grad]


def all_weights(stages: list[DiffusionTransformer], models: list[DataParallelStage]) -> list[WeightShard]:
    """All that this rank holds of the weights, to be filled."""
    grid = shard_grid(stages[0].spec.groups)
    sharded = [model for model in models if isinstance(model, FullyShardedStage)]
    return held_weights(sharded, grid) if sharded else whole_weights(named_parameters(stages), grid)


def trained_weights(stages: list[DiffusionTransformer], models: list[DataParallelStage]) -> list[WeightShard]:
    """Those that are not frozen."""
    trained = {name for name, _ in trained_parameters(stages)}
    return [shard for shard in all_weights(stages, models) if shard.name in trained]
