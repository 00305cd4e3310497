"""Megatron-FSDP behind one door: what the rest of the project knows of weights that ranks divide among them.

Each unit (a transformer block) is a bucket of its dtype's parameters, laid end to end and cut into equal stretches, one
for each rank of the replicas and context shards. A rank holds its stretch of the weights, of their fp32 copies, of the
gradients and of the optimizer's state; a unit's weights are gathered for its forward and its backward pass, beside the
computation of the unit before. With several optimizer instances (HSDP) the ranks of one divide, and gradients are
summed over the instances.

Nothing else imports ``megatron.core.distributed.fsdp``, so that another implementation can stand here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp.utils import FSDPDistributedIndex
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megatron_flashi2v.config.layout import asked_sharding
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.parallel.groups import Groups

BUCKET_SIZE = 40_000_000
"""Values that optim_grads reduces at once by default, as megatron-core's DistributedDataParallel does."""
BLOCKS_IN_FLIGHT = 2
"""Blocks whose gradients are reduced at once; half as many are gathered ahead."""


@dataclass(frozen=True, kw_only=True)
class ShardedParameter:
    """One parameter, and the stretch of it that this rank updates. Stretches are of the parameter's row-major order.

    Attributes:
        name: in the stage, which is the global name.
        shape: of the tensor-parallel rank's parameter.
        stretch: half-open, what this rank updates; may be empty.
        weights: its values in the model's dtype, 1-D.
        held_stretch: what this rank keeps of the weights: all of them under optim_grads.
        held_weights: its values, 1-D, sharing memory with ``weights``.
        trained: the optimizer's parameter, a DTensor; fp32.
        trained_weights: its values on this rank, 1-D.
    """

    name: str
    shape: tuple[int, ...]
    stretch: tuple[int, int]
    weights: Tensor
    held_stretch: tuple[int, int]
    held_weights: Tensor
    trained: nn.Parameter
    trained_weights: Tensor


class FullyShardedStage(FullyShardedDataParallel):
    """A stage whose gradients, and with optim_grads_params weights, ranks divide among them.

    The weights' memory is made here and holds anything: fill what :meth:`parameters_of_rank` gives, then call
    :meth:`take_weights`.

    Args:
        stage: hollow (:func:`hollow_parameters`), or with weights, which are kept.
        unit: class of the modules whose weights are gathered together.
        megatron: the stage's configuration.
        groups: of the layout; without a pipeline, and with several ranks to divide.
        parallel: what is sharded, over how many instances, in what portions.
        device: where the stage computes.
    """

    def __init__(
        self,
        stage: nn.Module,
        unit: type[nn.Module],
        megatron: TransformerConfig,
        groups: Groups,
        parallel: ParallelArguments,
        device: torch.device,
    ) -> None:
        strategy = asked_sharding(parallel)
        shards_weights = strategy == "optim_grads_params"
        portion = communication_unit(parallel, _largest(stage, unit))
        self._device_type = device.type
        super().__init__(
            config=megatron,
            ddp_config=DistributedDataParallelConfig(
                use_megatron_fsdp=True,
                use_distributed_optimizer=True,
                data_parallel_sharding_strategy=strategy,
                num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
                # Sharded over the instances too, megatron-core's gradient norm would miss the others' part.
                outer_dp_sharding_strategy="no_shard",
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                overlap_param_gather=shards_weights or parallel.overlap_param_gather,
                bucket_size=None if shards_weights else portion,
                # Scaling inside the reduction is NCCL's alone.
                gradient_reduce_div_fusion=torch.distributed.get_backend(groups.dp_cp) == "nccl",
                # fp32 weights are their own fp32 copies.
                preserve_fp32_weights=megatron.bf16,
            ),
            module=stage,
            fsdp_unit_modules=[unit] if shards_weights else [],
            pg_collection=groups.collection,
        )
        # Their default is at least a billion values, three blocks of the 14B model: 6.5 GB.
        self.module.suggested_RS_queue_capacity = portion
        self.module.suggested_AG_prefetch_size = portion // 2

    def parameters_of_rank(self) -> Iterator[ShardedParameter]:
        """Every parameter, also those that this rank updates nothing of."""
        buffer = self.param_and_grad_buffer
        for name, trained in buffer.optimizer_named_parameters:
            parameter = trained.orig_param
            weights = buffer.parameter_groups[buffer.param_to_param_group[parameter]].model_weight_buffer
            item = weights.param_idx[parameter]
            yield ShardedParameter(
                name=name,
                shape=tuple(parameter.shape),
                stretch=(trained.megatron_fsdp_slice.start, trained.megatron_fsdp_slice.stop),
                weights=weights.get_item(item, only_shard=True),
                held_stretch=weights.locate_item_in_global_item(item),
                held_weights=weights.get_item(item),
                trained=trained,
                trained_weights=flat_local(trained),
            )

    @property
    def shards_weights(self) -> bool:
        """Whether no rank holds the weights whole, so that each pass gathers them, block by block."""
        return bool(self.ddp_config.data_parallel_sharding_strategy == "optim_grads_params")

    @property
    def is_first_instance(self) -> bool:
        """Whether this rank belongs to the first optimizer instance, which stands for the others."""
        outer = self.megatron_fsdp_dist_index.get_outer_fsdp_group()
        return outer is None or outer.rank() == 0

    def take_weights(self) -> None:
        """Copy the weights, just filled, to what the optimizer updates."""
        self.param_and_grad_buffer.copy_model_weights_to_main_weights()

    def gather_weights(self) -> None:
        """Let the bare stage compute: it holds DTensors after a reduction, until the next forward pass of training."""
        self.module.start_param_sync()
        self.module._replace_param_with_raw_if_needed()

    def close(self) -> None:
        """Take back the hooks of the parameters, whose cycle Python's collector does not see: it would keep the stage,
        its buffers and the groups as long as the process lives."""
        for handle in self.module.grad_acc_hooks.values():
            handle.remove()

    def _init_dist_index(self, pg_collection: ProcessGroupCollection) -> FSDPDistributedIndex:
        """The mesh of all ranks; megatron-core's is always of CUDA."""
        sharding, outer = {"dp_cp": pg_collection.dp_cp}, None
        if self.ddp_config.num_distributed_optimizer_instances > 1:
            outer = "outer_dp"
            sharding = {outer: pg_collection.inter_dist_opt, "dp_cp": pg_collection.intra_dp_cp}
        groups = {**sharding, "tp": pg_collection.tp}
        self.tp_group = pg_collection.tp
        ranks = torch.arange(torch.distributed.get_world_size()).view([group.size() for group in groups.values()])
        return FSDPDistributedIndex(
            device_mesh=DeviceMesh.from_group(
                list(groups.values()), self._device_type, mesh=ranks, mesh_dim_names=tuple(groups)
            ),
            dp_outer_dim=outer,
            dp_shard_dim="dp_cp",
            tp_dim="tp",
            hybrid_fsdp_group=pg_collection.dp_cp if outer else None,
        )

    def _fix_tensor_parallel_attributes(self, module: nn.Module) -> None:
        """models/placement.py marks the parameters; megatron-core's own marks need Transformer Engine."""

    def sync_rng_states_across_tp_group(self) -> None:
        """Nothing draws from the device's generators."""


def communication_unit(parallel: ParallelArguments, block: int) -> int:
    """Values that are reduced at once.

    Args:
        parallel: a layout that shards gradients.
        block: values in the largest unit's parameters.
    """
    given = parallel.suggested_communication_unit_size
    if given is not None:
        return given
    return BLOCKS_IN_FLIGHT * block if asked_sharding(parallel) == "optim_grads_params" else BUCKET_SIZE


def _largest(stage: nn.Module, unit: type[nn.Module]) -> int:
    """Values in the largest unit's parameters."""
    return max(
        sum(parameter.numel() for parameter in module.parameters())
        for module in stage.modules() if isinstance(module, unit)
    )


def flat_local(value: Tensor) -> Tensor:
    """This rank's values of a DTensor, 1-D, sharing its memory."""
    local: Tensor = value.detach().to_local()  # type: ignore[attr-defined]
    return local.view(-1)


@contextlib.contextmanager
def parameters_on_meta(megatron: TransformerConfig) -> Iterator[None]:
    """Inside, modules are built without memory for their parameters.

    Args:
        megatron: the configuration that they are built with.
    """
    before = megatron.use_cpu_initialization
    megatron.use_cpu_initialization = True  # else megatron-core's linears name a device themselves
    try:
        with torch.device("meta"):
            yield
    finally:
        megatron.use_cpu_initialization = before


def hollow_parameters(module: nn.Module, device: torch.device) -> None:
    """Put parameters on ``device`` in place of those on the meta device, each with memory for one value alone."""
    for buffer_name, buffer in module.named_buffers():
        assert not buffer.is_meta, f"buffer {buffer_name} needs values"
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            values = torch.empty_strided(
                parameter.shape, (0,) * parameter.ndim, dtype=parameter.dtype, device=device
            )
            hollow = nn.Parameter(values, requires_grad=parameter.requires_grad)
            vars(hollow).update(vars(parameter))
            setattr(part, name, hollow)
