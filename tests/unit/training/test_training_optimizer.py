"""Which tensors decay, and the learning rate as a function of the iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments, OptimizerArguments, ParallelArguments, TrainConfig
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.training.optimizer import make_optimizer, make_scheduler, wrap_data_parallel

CONFIG = ModelConfig(
    num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, latent_channels=2, freq_dim=8,
    text_dim=6, text_length=4, phi_hidden_channels=4,
)


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def update_without_gradients(groups: Groups, config: TrainConfig) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """All parameters before and after one optimizer step on zero gradients, started at 1: only decay moves them."""
    spec = make_spec(CONFIG, groups, torch.device("cpu"), bf16=config.batch.bf16)
    model = DiffusionTransformer(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    (wrapped,) = wrap_data_parallel([model], config.parallel)
    optimizer = make_optimizer([wrapped], config.optimizer, config.parallel, spec)
    make_scheduler(optimizer, config.optimizer, 10, 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    wrapped.finish_grad_sync()
    optimizer.step()
    return {name: (before[name], parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer, distributed", [("adam", False), ("adam", True), ("sgd", False)])
@pytest.mark.parametrize("bf16", [False, True])
def test_matrices_and_modulation_decay_biases_and_norms_do_not(
    groups: Groups, optimizer: str, distributed: bool, bf16: bool
) -> None:
    config = TrainConfig(
        optimizer=OptimizerArguments(optimizer=optimizer, lr=0.1, weight_decay=0.5, clip_grad=0.0),
        parallel=ParallelArguments(use_distributed_optimizer=distributed),
        batch=BatchArguments(bf16=bf16),
    )
    seen = set()
    for name, (before, after) in update_without_gradients(groups, config).items():
        kept = name.endswith(".bias") or ".norm_" in name
        seen.add(kept)
        expected = before if kept else before * (1 - 0.1 * 0.5)
        torch.testing.assert_close(after, expected.to(after.dtype), atol=1e-6, rtol=0, msg=name)
    assert seen == {True, False}


@pytest.mark.parametrize("optimizer, distributed", [("adam", False), ("adam", True), ("sgd", False)])
def test_all_parameters_decay_by_the_references_rules(groups: Groups, optimizer: str, distributed: bool) -> None:
    """Those of torch's optimizers without groups."""
    arguments = OptimizerArguments(
        optimizer=optimizer, lr=0.1, weight_decay=0.5, clip_grad=0.0, weight_decay_rules="reference"
    )
    config = TrainConfig(optimizer=arguments, parallel=ParallelArguments(use_distributed_optimizer=distributed))
    kinds = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}
    for name, (before, after) in update_without_gradients(groups, config).items():
        expected = torch.nn.Parameter(before.clone())
        expected.grad = torch.zeros_like(before)
        kinds[optimizer]([expected], lr=0.1, weight_decay=0.5).step()
        assert not torch.equal(expected.detach(), before)
        torch.testing.assert_close(after, expected.detach(), atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("distributed", [False, True])
def test_adam_is_torchs_fused_one(groups: Groups, distributed: bool) -> None:
    """One kernel for the whole update."""
    config = TrainConfig(parallel=ParallelArguments(use_distributed_optimizer=distributed))
    spec = make_spec(CONFIG, groups, torch.device("cpu"))
    (wrapped,) = wrap_data_parallel([DiffusionTransformer(spec)], config.parallel)
    optimizer = make_optimizer([wrapped], config.optimizer, config.parallel, spec)
    make_scheduler(optimizer, config.optimizer, 10, 0)
    kernels: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kernels.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Watch():
        optimizer.step()
    assert "_fused_adamw_" in kernels and not {"addcdiv_", "_foreach_addcdiv_"} & set(kernels)
    assert {group["wd_mult"] for group in optimizer.param_groups} == {0.0, 1.0}


def rates(arguments: OptimizerArguments, train_iters: int, count: int, done: int = 0) -> list[float]:
    """Learning rates of ``count`` iterations after ``done``, as the trainer reads them before each update."""
    optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}, {"wd_mult": 0.0}])
    scheduler, found = make_scheduler(optimizer, arguments, train_iters, done), []
    for _ in range(count):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        assert [group["weight_decay"] for group in optimizer.param_groups] == [arguments.weight_decay, 0.0]
        found.append(first)
        scheduler.step(increment=1)
    return found


def after_warmup(style: str) -> Callable[[int, int, int, float, float], float]:
    """Rate after ``n`` finished iterations: (n, warm-up, decay iterations, peak, minimum)."""
    return {
        "constant": lambda n, w, d, peak, low: peak,
        "linear": lambda n, w, d, peak, low: low + (peak - low) * (1 - (n - w) / (d - w)),
        "cosine": lambda n, w, d, peak, low: low + (peak - low) * (1 + math.cos(math.pi * (n - w) / (d - w))) / 2,
        "inverse-square-root": lambda n, w, d, peak, low: max(low, peak * math.sqrt(max(w, 1) / max(n, 1))),
    }[style]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("decay_iters", [None, 12])
def test_schedule_follows_its_formula(style: str, warmup: int, decay_iters: int | None) -> None:
    peak, low, train_iters = 3e-3, 1e-4, 20
    arguments = OptimizerArguments(
        lr=peak, min_lr=low, lr_decay_style=style, lr_warmup_iters=warmup, lr_decay_iters=decay_iters
    )
    length = decay_iters or train_iters
    expected = []
    for done in range(train_iters):
        if warmup and done <= warmup:
            expected.append(peak * done / warmup)
        elif done > length and style != "constant":
            expected.append(low)
        else:
            expected.append(after_warmup(style)(done, warmup, length, peak, low))
    assert rates(arguments, train_iters, train_iters) == pytest.approx(expected, rel=1e-12)


def test_a_resumed_schedule_goes_on_where_it_was() -> None:
    arguments = OptimizerArguments(lr=1e-3, lr_decay_style="cosine", lr_warmup_iters=3)
    assert rates(arguments, 12, 5, done=7) == rates(arguments, 12, 12)[7:]


def test_warm_up_over_the_whole_run_is_accepted() -> None:
    arguments = OptimizerArguments(lr=1.0, lr_decay_style="cosine", lr_warmup_iters=4)
    assert rates(arguments, 4, 4) == [0.0, 0.25, 0.5, 0.75]
