"""The gradients' norm and the update beside megatron-core's own, and how many operators they take."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.optimizer import MegatronOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import OptimizerArguments, ParallelArguments
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.training.optimizer import apply_gradients, gradient_norm, make_optimizer, wrap_data_parallel

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, latent_channels=2, freq_dim=8,
    text_dim=6, text_length=4, phi_hidden_channels=4,
)
KINDS = [(bf16, distributed) for bf16 in (False, True) for distributed in (False, True)]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def ready(groups: Groups, *, bf16: bool, distributed: bool) -> tuple[DiffusionTransformer, MegatronOptimizer]:
    """A model and its optimizer with prepared gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    spec = make_spec(CONFIG, groups, torch.device("cpu"), bf16=bf16)
    model = DiffusionTransformer(spec)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    parallel = ParallelArguments(use_distributed_optimizer=distributed)
    (wrapped,) = wrap_data_parallel([model], parallel)
    optimizer = make_optimizer([wrapped], OptimizerArguments(lr=0.01), parallel, spec)
    wrapped.zero_grad_buffer()
    for parameter in model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[attr-defined]
    optimizer.prepare_grads()
    return model, optimizer


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bf16, distributed", KINDS)
def test_the_norm_is_that_of_all_gradients_and_stays_on_the_device(
    groups: Groups, bf16: bool, distributed: bool
) -> None:
    model, optimizer = ready(groups, bf16=bf16, distributed=distributed)
    with Operators() as ran:
        norm = gradient_norm(optimizer, torch.device("cpu"))
    assert "_foreach_norm" in ran.names and not {"_local_scalar_dense", "linalg_vector_norm", "_to_copy"} & {*ran.names}
    whole = torch.cat([parameter.main_grad.flatten().double() for parameter in model.parameters()])
    assert norm.item() == pytest.approx(whole.norm().item(), rel=1e-6)
    assert norm.item() == pytest.approx(optimizer.get_grad_norm(), rel=1e-6)
    next(model.parameters()).main_grad.view(-1)[0] = float("nan")
    assert gradient_norm(optimizer, torch.device("cpu")).isnan()


@pytest.mark.parametrize("bf16, distributed", KINDS)
def test_the_update_is_megatron_cores_in_fewer_operators(groups: Groups, bf16: bool, distributed: bool) -> None:
    ours, theirs = (ready(groups, bf16=bf16, distributed=distributed) for _ in range(2))
    before = copy.deepcopy(list(ours[0].parameters()))
    with Operators() as ran:
        apply_gradients(ours[1])
    theirs[1].step_with_ready_grads()
    for parameter, expected, old in zip(ours[0].parameters(), theirs[0].parameters(), before, strict=True):
        assert torch.equal(parameter, expected) and not torch.equal(parameter, old)
    assert ran.names.count("_foreach_copy_") == (2 if bf16 else 0)  # matrices decay, vectors do not
    assert "copy_" not in ran.names or distributed
