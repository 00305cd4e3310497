"""The state of megatron-core's optimizers as parts of global tensors, saved and loaded at any layout.

An optimizer keeps, for each parameter, its moments and, under bf16, an fp32 master copy: of the whole local
parameter, or, in the distributed optimizer, of one contiguous stretch of it per data-parallel rank. A checkpoint
stores all of them as ``optimizer.<what>.<parameter name>`` in the global tensor's coordinates, so that any optimizer
loads what any other wrote. ``step`` is one number for all parameters and belongs to the common state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)

from megatron_flashi2v.checkpoint.index import Index, read_index
from megatron_flashi2v.checkpoint.model_state import MASTER_PREFIX, MODEL_PREFIX, NamedParameters
from megatron_flashi2v.checkpoint.storage import TensorPiece, read_pieces
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.models.placement import parameter_box
from megatron_flashi2v.parallel.fully_sharded import flat_local
from megatron_flashi2v.parallel.placement import ParameterBox, ShardGrid

OPTIMIZER_PREFIX = "optimizer."


@dataclass(frozen=True, kw_only=True)
class OptimizerShard:
    """An optimizer's state of one parameter on this rank.

    Attributes:
        name: global name of the parameter.
        box: where the parameter lies in the global tensor.
        flat_range: stretch of the flattened parameter that this rank updates; None is all of it.
        owner: whether this rank writes these values; replicas do not.
        weights: the values that the inner optimizer updates, 1-D under ``flat_range``.
        parameter: the inner optimizer's own parameter, which holds them: the same tensor, or a DTensor.
        has_master: whether ``weights`` is an fp32 copy, apart from the model's own (bf16) parameter.
        inner: the torch-style optimizer.
    """

    name: str
    box: ParameterBox
    flat_range: tuple[int, int] | None
    owner: bool
    weights: torch.Tensor
    parameter: torch.Tensor
    has_master: bool
    inner: torch.optim.Optimizer

    def piece(self, key: str, data: torch.Tensor) -> TensorPiece:
        """A tensor that is laid out like ``weights``, as a part of the global tensor ``key``."""
        return TensorPiece(
            key=key,
            global_shape=self.box.global_shape,
            offset=self.box.offset,
            shape=self.box.shape,
            flat_range=self.flat_range,
            data=data.detach(),
            owner=self.owner,
        )

    @property
    def state(self) -> dict[str, Any]:
        """The inner optimizer's state of this parameter; empty before the first step."""
        return self.inner.state.get(self.parameter, {})

    @property
    def gradient(self) -> torch.Tensor | None:
        """What the inner optimizer applies next, laid out like ``weights``, if there is one."""
        return None if self.parameter.grad is None else self.values_of(self.parameter.grad)

    def values_of(self, state: torch.Tensor) -> torch.Tensor:
        """This rank's values of a tensor that is laid out like ``parameter``, laid out like ``weights``."""
        return state if self.parameter is self.weights else flat_local(state)


def optimizer_shards(
    optimizer: MegatronOptimizer, named_parameters: NamedParameters, grid: ShardGrid
) -> Iterator[OptimizerShard]:
    """Yield the state of every parameter that ``optimizer`` updates on this rank.

    Args:
        optimizer: from mcore's ``get_megatron_optimizer``: FP32, Float16 or distributed, or a chain of them.
        named_parameters: global names and this rank's parameters.
        grid: this rank's place.

    Raises:
        CheckpointError: the state of such an optimizer cannot be stored, or a parameter has no name.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    for part in unchained(optimizer):
        if isinstance(part, DistributedOptimizer) and part.ddp_config.use_megatron_fsdp:
            yield from _fully_sharded(part, grid)
            continue
        sharded = isinstance(part, DistributedOptimizer)
        for parameter, weights in _weights(part):
            name = names.get(id(parameter))
            if name is None:
                raise CheckpointError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that has no name"
                )
            box = parameter_box(name, parameter.shape, grid)
            if sharded:
                stretch = part._get_model_param_range_map(parameter)["param"]
                # With several instances of the optimizer each holds all the state; the first one writes it.
                first_replica = part.distributed_optimizer_instance_id == 0
            else:
                first_replica = grid.dp_rank == 0
            yield OptimizerShard(
                name=name,
                box=box,
                flat_range=(stretch.start, stretch.end) if sharded else None,
                owner=box.first_of_tp and first_replica,
                weights=weights,
                parameter=weights,
                has_master=weights.dtype != parameter.dtype,
                inner=part.optimizer,
            )


def _fully_sharded(part: DistributedOptimizer, grid: ShardGrid) -> Iterator[OptimizerShard]:
    """The state that this rank holds of what it updates; there is none of an empty stretch."""
    for stage in part.model_chunks:
        for held in stage.parameters_of_rank():
            if held.weights.numel():
                box = parameter_box(held.name, held.shape, grid)
                yield OptimizerShard(
                    name=held.name, box=box, flat_range=held.stretch,
                    owner=box.first_of_tp and stage.is_first_instance,
                    weights=held.trained_weights, parameter=held.trained,
                    has_master=held.trained_weights.dtype != held.weights.dtype, inner=part.optimizer,
                )


def unchained(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """The optimizers behind an optimizer of megatron-core that hold parameters."""
    if isinstance(optimizer, ChainedOptimizer):
        for part in optimizer.chained_optimizers:
            yield from unchained(part)
    elif not optimizer.is_stub_optimizer:  # a stage may have nothing to train
        yield optimizer


def _weights(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield (the model's parameter, the tensor that the inner optimizer updates)."""
    if optimizer.config.use_precision_aware_optimizer or optimizer.config.optimizer_cpu_offload:
        raise CheckpointError("the state of a precision-aware or CPU-offloaded optimizer cannot be stored")
    if isinstance(optimizer, DistributedOptimizer):
        # mcore's own index into the parameter groups is wrong for a group that mixes fp32 and bf16
        # parameters: it counts in the order of the gradient buffers, while the group lists its fp32
        # parameters first.
        pairs = [
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ]
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = [
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ]
    elif isinstance(optimizer, FP32Optimizer):
        groups = [group["params"] for group in optimizer.optimizer.param_groups]
        pairs = [(groups, groups)]
    else:
        raise CheckpointError(f"the state of a {type(optimizer).__name__} cannot be stored")
    for parameter_groups, weight_groups in pairs:
        for parameters, weights in zip(parameter_groups, weight_groups, strict=True):
            yield from zip(parameters, weights, strict=True)


def optimizer_pieces(
    optimizer: MegatronOptimizer, named_parameters: NamedParameters, grid: ShardGrid
) -> list[TensorPiece]:
    """The pieces ``optimizer.<what>.<name>`` of this rank; their data share the optimizer's memory.

    ``master`` for fp32 copies, and whatever tensors the inner optimizer keeps (``exp_avg``, ``exp_avg_sq``,
    ``momentum_buffer``); none of the latter before the first step.
    """
    pieces = []
    for shard in optimizer_shards(optimizer, named_parameters, grid):
        if shard.has_master:
            pieces.append(shard.piece(MASTER_PREFIX + shard.name, shard.weights))
        for what, value in _tensors(shard).items():
            pieces.append(shard.piece(f"{OPTIMIZER_PREFIX}{what}.{shard.name}", value))
    return pieces


def _tensors(shard: OptimizerShard) -> dict[str, torch.Tensor]:
    tensors = {}
    for what, value in shard.state.items():
        if what == "step" or value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.shape != shard.parameter.shape:
            raise CheckpointError(
                f"the optimizer's state {what!r} of {shard.name} is not shaped like the parameter"
            )
        tensors[what] = shard.values_of(value)
    return tensors


def optimizer_common_state(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """JSON-ready state that all parameters share: ``{"step": updates done, or None before the first}``.

    The scheduler keeps the learning rate and the weight decay.

    Raises:
        CheckpointError: parameters have done different numbers of steps.
    """
    return common_step([{"step": step} for step in _steps(optimizer)])


def common_step(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What ranks' parameters share, of :func:`optimizer_common_state` of each; a rank without any has no step.

    Raises:
        CheckpointError: ranks have done different numbers of steps.
    """
    steps = {state["step"] for state in states if state["step"] is not None}
    if len(steps) > 1:
        raise CheckpointError(
            f"the optimizer's parameters have done different numbers of steps: {sorted(steps)}"
        )
    return {"step": steps.pop() if steps else None}


def _steps(optimizer: MegatronOptimizer) -> set[int]:
    steps = set()
    for part in unchained(optimizer):
        # torch keeps the step per parameter, the fused optimizers of apex and TE per group.
        for state in (*part.optimizer.state.values(), *part.optimizer.param_groups):
            if state.get("step") is not None:
                steps.add(int(state["step"]))
    return steps


def load_optimizer(
    folder: Path,
    optimizer: MegatronOptimizer,
    named_parameters: NamedParameters,
    grid: ShardGrid,
    common_state: Mapping[str, Any],
) -> None:
    """Fill this rank's optimizer in place from a checkpoint of any layout and any of mcore's optimizers.

    Creates state that does not exist before the first step. Takes a master copy that the checkpoint lacks from the
    model's tensor. Where the checkpoint holds no moments at all (converted weights, or saved before the first step),
    the optimizer starts anew.

    Args:
        folder: a checkpoint.
        optimizer: as in :func:`optimizer_shards`.
        named_parameters: global names and this rank's parameters.
        grid: this rank's place.
        common_state: result of :func:`optimizer_common_state` when the checkpoint was saved.

    Raises:
        CheckpointError: the checkpoint was written with another kind of optimizer, or is damaged.
    """
    index = read_index(folder)
    shards = list(optimizer_shards(optimizer, named_parameters, grid))
    masters = [
        shard.piece(_master_key(index, shard.name), shard.weights) for shard in shards if shard.has_master
    ]
    read_pieces(folder, masters, allow_cast=True, index=index)
    stored = _stored_kinds(index)
    if not stored:
        return
    moments = []
    for shard in shards:
        expected = _expected_kinds(shard)
        if expected != stored:
            raise CheckpointError(
                f"{folder} holds the optimizer state {_listed(stored)}, but this optimizer "
                f"({type(shard.inner).__name__}) keeps {_listed(expected)}; resume with the optimizer that "
                f"wrote it"
            )
        for what in sorted(expected):
            state = shard.inner.state[shard.parameter]
            if state.get(what) is None:
                state[what] = torch.zeros_like(shard.parameter)
            moments.append(shard.piece(f"{OPTIMIZER_PREFIX}{what}.{shard.name}", shard.values_of(state[what])))
    read_pieces(folder, moments, index=index)
    _set_step(shards, common_state)


def _master_key(index: Index, name: str) -> str:
    return MASTER_PREFIX + name if MASTER_PREFIX + name in index.tensors else MODEL_PREFIX + name


def _stored_kinds(index: Index) -> frozenset[str]:
    """Names of the tensors per parameter that a checkpoint holds, apart from master copies."""
    keys = (key.removeprefix(OPTIMIZER_PREFIX) for key in index.tensors if key.startswith(OPTIMIZER_PREFIX))
    return frozenset(key.partition(".")[0] for key in keys) - {"master"}


def _expected_kinds(shard: OptimizerShard) -> frozenset[str]:
    """Names of the tensors that the inner optimizer keeps once it has taken a step."""
    defaults = shard.inner.defaults
    if "betas" in defaults:
        return frozenset({"exp_avg", "exp_avg_sq"})
    return frozenset({"momentum_buffer"}) if defaults.get("momentum") else frozenset()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _set_step(shards: list[OptimizerShard], common_state: Mapping[str, Any]) -> None:
    step = common_state.get("step")
    for shard in shards:
        if "betas" not in shard.inner.defaults:
            continue  # SGD counts no steps
        if step is None:
            raise CheckpointError("the checkpoint holds Adam's moments, but not its number of steps")
        if isinstance(shard.inner, (torch.optim.Adam, torch.optim.AdamW)):
            # the fused step counts on the weights' device, the others on the host
            fused = any(group.get("fused") for group in shard.inner.param_groups)
            device = shard.weights.device if fused else torch.device("cpu")
            shard.state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
        else:
            for group in shard.inner.param_groups:
                group["step"] = int(step)
