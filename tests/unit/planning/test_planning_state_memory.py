"""The memory of a rank's state, against the tensors that megatron-core's optimizer really keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments, OptimizerArguments, ParallelArguments, TrainConfig
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.planning.state_memory import state_memory
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.training.holdings import holding_of, parameter_shapes_of
from megatron_flashi2v.training.optimizer import make_optimizer, make_scheduler, wrap_data_parallel
from megatron_flashi2v.training.partial import freeze

CONFIG = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=4,
                     text_dim=8, text_length=6)  # fmt: skip


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def storages(tensors: Any) -> dict[int, int]:
    """Size in bytes of each memory that the tensors share."""
    found = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name, momentum, sharded, adapter", [
    ("adam", 0.9, False, None), ("adam", 0.9, True, None), ("sgd", 0.9, False, None), ("sgd", 0.0, False, None),
    ("adam", 0.9, True, AdapterConfig(rank=2, alpha=2.0, targets=("self_attn.q", "ffn.2"))),
])
def test_planned_bytes_are_those_that_an_optimizer_keeps(
    groups: Groups, name: str, momentum: float, sharded: bool, adapter: AdapterConfig | None, bf16: bool
) -> None:
    config = TrainConfig(
        optimizer=OptimizerArguments(optimizer=name, sgd_momentum=momentum),
        parallel=ParallelArguments(use_distributed_optimizer=sharded), batch=BatchArguments(bf16=bf16),
    )
    spec = make_spec(CONFIG, groups, torch.device("cpu"), bf16=bf16, adapter=adapter)
    model = DiffusionTransformer(spec)
    if adapter is not None:
        freeze([model], ("head.linear.weight",))
    held = holding_of([model], parameter_shapes_of([model]), [(2, 4, 4)])
    (wrapped,) = wrap_data_parallel([model], config.parallel)
    optimizer = make_optimizer([wrapped], config.optimizer, config.parallel, spec)
    make_scheduler(optimizer, config.optimizer, 10, 0)
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    wrapped.finish_grad_sync()
    optimizer.step()
    planned = state_memory(held, config, 1)
    assert planned.weights < 4 * held.parameters if bf16 else planned.weights == 4 * held.parameters
    gradients = storages(buffer.grad_data for buffer in wrapped.buffers + wrapped.expert_parallel_buffers)
    weights = storages(model.parameters())
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    kept = [parameter for part in parts for group in part.optimizer.param_groups for parameter in group["params"]]
    kept += [tensor for part in parts for values in part.optimizer.state.values() for tensor in values.values()]
    ours = {at: size for at, size in storages(kept).items() if at not in weights and size > 8}
    # megatron-core aligns its buffers, and the parts in them, to 64 values.
    padding = 4 * 64 * (len(list(model.parameters())) + 2)
    assert planned.gradients <= sum(gradients.values()) <= planned.gradients + padding
    assert planned.weights <= sum(weights.values()) <= planned.weights + padding
    assert planned.optimizer == sum(ours.values())
    assert planned.average == 0
    averaging = dataclasses.replace(
        config, optimizer=OptimizerArguments(ema_decay=0.9), parallel=ParallelArguments(use_distributed_optimizer=True)
    )
    assert state_memory(held, averaging, 4).average == held.trained
