"""Process groups: made once by megatron-core, handed on as one argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_flashi2v.config.layout import ring_degree, ulysses_degree
from megatron_flashi2v.config.train import ParallelArguments


@dataclass(frozen=True)
class Groups:
    """The groups of this rank, with its place in each.

    Attributes:
        collection: what megatron-core's schedules, DDP and optimizer take.
        sequence_parallel: whether tokens are sharded over tensor-parallel ranks between the matrix products.
        ulysses: context-parallel ranks that trade tokens for heads, neighbours in ``cp``; None without any.
        ring: context-parallel ranks that pass keys and values around, one of each Ulysses group; None without any.
    """

    collection: ProcessGroupCollection
    sequence_parallel: bool
    ulysses: torch.distributed.ProcessGroup | None = None
    ring: torch.distributed.ProcessGroup | None = None

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
        """Parts that a context block's tokens, and the text rows, are in between the matrix products."""
        return self.tp.size() if self.sequence_parallel else 1

    @property
    def token_parts(self) -> int:
        """Parts that a sample's visual tokens are in between the matrix products."""
        return self.cp.size() * self.token_shards


def make_groups(parallel: ParallelArguments) -> Groups:
    """Create megatron-core's groups for the layout; torch.distributed must be initialised.

    Sequence parallelism is meaningless without tensor parallelism, and megatron-core refuses it: it is turned off
    for one tensor-parallel rank, so that a recipe with it also runs on one process.
    """
    degrees = [ulysses_degree(parallel), ring_degree(parallel)]
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        # The first level's ranks are neighbours, so that Ulysses' exchanges, the larger ones, stay inside a node.
        hierarchical_context_parallel_sizes=degrees if min(degrees) > 1 else None,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        distributed_timeout_minutes=math.ceil(parallel.distributed_timeout_minutes),
        create_gloo_process_groups=False,  # only megatron-core's own checkpoint formats use them
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    ulysses, ring = collection.hcp if min(degrees) > 1 else (collection.cp, collection.cp)
    return Groups(
        collection=collection,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        ulysses=ulysses if degrees[0] > 1 else None,
        ring=ring if degrees[1] > 1 else None,
    )


def destroy_groups() -> None:
    """Forget the groups, so that another layout can be made in this process (tests do)."""
    parallel_state.destroy_model_parallel()
