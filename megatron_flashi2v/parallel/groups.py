"""Process groups: made once by megatron-core, handed on as one argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_flashi2v.config.train import ParallelArguments


@dataclass(frozen=True)
class Groups:
    """The groups of this rank, with its place in each.

    ``collection`` is what megatron-core's schedules, DDP and optimizer take.
    """

    collection: ProcessGroupCollection
    sequence_parallel: bool

    @property
    def tp(self) -> torch.distributed.ProcessGroup:
        """Ranks that share each layer's matrices."""
        return self.collection.tp

    @property
    def pp(self) -> torch.distributed.ProcessGroup:
        """Stages of one pipeline."""
        return self.collection.pp

    @property
    def cp(self) -> torch.distributed.ProcessGroup:
        """Ranks that share one sample's tokens."""
        return self.collection.cp

    @property
    def dp(self) -> torch.distributed.ProcessGroup:
        """Replicas that see different samples."""
        return self.collection.dp

    @property
    def dp_cp(self) -> torch.distributed.ProcessGroup:
        """Ranks whose gradients are reduced together: replicas times context shards."""
        return self.collection.dp_cp

    @property
    def token_shards(self) -> int:
        """Parts that a replica's tokens and text rows are in between the matrix products."""
        return self.tp.size() if self.sequence_parallel else 1


def make_groups(parallel: ParallelArguments) -> Groups:
    """Create megatron-core's groups for the layout; torch.distributed must be initialised.

    Sequence parallelism is meaningless without tensor parallelism, and megatron-core refuses it: it is turned off
    for one tensor-parallel rank, so that a recipe with it also runs on one process.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=math.ceil(parallel.distributed_timeout_minutes),
        create_gloo_process_groups=False,  # only megatron-core's own checkpoint formats use them
    )
    return Groups(
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
    )


def destroy_groups() -> None:
    """Forget the groups, so that another layout can be made in this process (tests do)."""
    parallel_state.destroy_model_parallel()
