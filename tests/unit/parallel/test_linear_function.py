"""The linears' product beside torch's in fp64: outputs, gradients, what is exchanged, and what is summed where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.models.initialization import initialize_weights
from megatron_flashi2v.models.recompute import Recompute
from megatron_flashi2v.models.spec import ModelSpec, make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.linear import (
    FusedColumnParallelLinear,
    FusedRowParallelLinear,
    column_parallel,
    row_parallel,
)
from megatron_flashi2v.parallel.linear_function import Exchange, add_weight_gradient, linear, sums_into_fp32
from megatron_flashi2v.parallel.world import single_process, world
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.training import step
from megatron_flashi2v.training.batch import Microbatch
from megatron_flashi2v.training.optimizer import wrap_data_parallel

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, latent_channels=3, text_dim=5,
    text_length=4, freq_dim=8, phi_hidden_channels=4,
)
LINEARS = (FusedColumnParallelLinear, FusedRowParallelLinear)


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor | None, expected: Tensor | None, relative: float = 1e-6) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.shape == expected.shape
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error <= relative, f"{error:.1e} off"


def fp64_product(buffer: Tensor, first: Tensor, second: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """What torch.addmm does with ``out_dtype`` on CUDA: the sum is rounded once."""
    return out.copy_(buffer.double() + first.double() @ second.double())


def bf16_product(buffer: Tensor, first: Tensor, second: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """Rounds what it adds to."""
    return out.copy_(torch.addmm(buffer.bfloat16(), first, second))


def no_product(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(7, 2, 5), (7, 5)])
@pytest.mark.parametrize("frozen", ["", "rows", "weight", "bias", "rows weight"])
@pytest.mark.parametrize("strided", [False, True])
def test_outputs_and_gradients(shape: tuple[int, ...], frozen: str, strided: bool) -> None:
    inputs = {"rows": draw(*shape), "weight": draw(3, 5, seed=1), "bias": draw(3, seed=2)}
    if strided:
        inputs["rows"] = inputs["rows"].transpose(0, -1).contiguous().transpose(0, -1)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    for tensors in (inputs, exact):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in frozen.split())
    output = linear(*inputs.values(), Exchange(), add_weight_gradient)
    expected = F.linear(*exact.values())
    grad = draw(*expected.shape, seed=3)
    if strided:
        grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
    output.backward(grad)
    expected.backward(grad.double())
    assert_near(output, expected)
    for name, tensor in inputs.items():
        assert_near(tensor.grad, exact[name].grad)


def test_a_frozen_weight_keeps_no_activation() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = linear(draw(7, 5).requires_grad_(), draw(3, 5), None, Exchange(), add_weight_gradient)
    assert output.requires_grad and [tuple(tensor.shape) for tensor in kept] == [(3, 5)]


@pytest.mark.parametrize("kind", [column_parallel, row_parallel])
def test_the_product_adds_the_bias(groups: Groups, kind: Any) -> None:
    spec = make_spec(CONFIG, groups, torch.device("cpu"), bf16=True)
    module = kind(spec.column_linear if kind is column_parallel else spec.row_linear, 16, 8, spec.megatron, groups)
    with torch.no_grad(), Operations() as ran:
        module.weight.copy_(draw(8, 16, seed=1))
        module.bias.copy_(draw(8, seed=2))
        output, left = module(draw(3, 2, 16, dtype=torch.bfloat16))
    computed = {name for name in ran.names if "mm" in name or "add" in name or "linear" in name}
    assert computed == {"addmm"} and left is None
    expected = F.linear(draw(3, 2, 16, dtype=torch.bfloat16).double(), module.weight.double(), module.bias.double())
    assert torch.equal(output, expected.bfloat16())  # rounded once


def test_an_fp32_sum_is_not_rounded() -> None:
    grad, rows, buffer = draw(50, 3, dtype=torch.bfloat16), draw(50, 5, seed=1, dtype=torch.bfloat16), draw(3, 5)
    exact = buffer.double() + grad.double().t() @ rows.double()
    fused, plain = buffer.clone(), buffer.clone()
    add_weight_gradient(fused, grad, rows, product=fp64_product)
    add_weight_gradient(plain, grad, rows, product=no_product)
    assert_near(fused, exact, 1e-7)
    assert 1e-4 < (plain - exact).norm() / exact.norm() < 5e-3  # the product alone was rounded to bf16
    single = buffer.clone()
    add_weight_gradient(single, grad.float(), rows.float(), product=no_product)
    assert_near(single, exact)


@pytest.mark.parametrize("product, sums", [
    (fp64_product, True), (bf16_product, False), (no_product, False), (lambda: None, False),
])
def test_what_a_device_can_sum_is_tried_out(product: Any, sums: bool) -> None:
    assert sums_into_fp32(product, torch.device("cpu"), torch.bfloat16) is sums


def test_it_is_tried_out_once() -> None:
    calls: list[int] = []

    def product(*arguments: Any, **named: Any) -> Tensor:
        calls.append(1)
        return fp64_product(*arguments, **named)

    buffer = torch.zeros(3, 5)
    for count in (2, 3, 4):
        add_weight_gradient(buffer, draw(7, 3, dtype=torch.bfloat16), draw(7, 5, dtype=torch.bfloat16), product=product)
        assert len(calls) == count


def buffered(weight: nn.Parameter) -> nn.Parameter:
    """As megatron-core's data parallelism leaves a parameter, with a gradient in its buffer already."""
    weight.main_grad = draw(*weight.shape, seed=9)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_a_shared_weight_is_summed_over_its_uses(again: bool) -> None:
    weight, rows = buffered(nn.Parameter(draw(5, 5, seed=1))), draw(7, 2, 5).requires_grad_()

    def twice(rows: Tensor) -> Tensor:
        once = linear(rows, weight, None, Exchange(), add_weight_gradient)
        return linear(once.tanh(), weight, None, Exchange(), add_weight_gradient)

    (checkpoint(twice, rows, use_reentrant=False) if again else twice(rows)).sum().backward()
    exact = weight.detach().double().requires_grad_()
    F.linear(F.linear(rows.detach().double(), exact).tanh(), exact).sum().backward()
    assert exact.grad is not None
    assert_near(weight.main_grad, draw(5, 5, seed=9).double() + exact.grad)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_a_gradient_that_is_read_is_zero() -> None:
    weight = buffered(nn.Parameter(draw(3, 5)))
    weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    linear(draw(7, 5), weight, None, Exchange(), add_weight_gradient).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_sharded_weights_buffer_is_asked_for_and_holds_this_pass_alone() -> None:
    """Megatron-FSDP's, which holds anything when it is handed out."""
    weight, buffer = nn.Parameter(draw(3, 5)), torch.full((3, 5), torch.nan)
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    weight.get_main_grad = lambda: buffer  # type: ignore[attr-defined]
    linear(draw(7, 5), weight, None, Exchange(), add_weight_gradient).sum().backward()
    assert_near(buffer, draw(7, 5).double().sum(0).expand(3, 5))
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def make_batch(seed: int) -> Microbatch:
    sigma_B = torch.tensor([0.2, 0.7])
    return Microbatch(
        latents_BCTHW=draw(2, 3, 2, 4, 6, seed=seed), noise_BCTHW=draw(2, 3, 2, 4, 6, seed=seed + 1), sigma_B=sigma_B,
        sinusoid_BF=timestep_sinusoid(1000 * sigma_B, CONFIG.freq_dim), text_BLX=draw(2, 4, 5, seed=seed + 2),
        extras={"cutoff_ratio": torch.tensor([0.1, 0.6])},
    )


def make_model(spec: ModelSpec, recompute: Recompute | None = None) -> DiffusionTransformer:
    model = DiffusionTransformer(spec, recompute=recompute or Recompute())
    initialize_weights(model, 0)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():  # what starts at zero has no gradients before it
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def backward(spec: ModelSpec, model: nn.Module, batches: list[Microbatch]) -> None:
    for batch in batches:
        output, loss = step.forward_step(spec, iter([batch]), model)
        loss(output)[0].backward()


@pytest.fixture(scope="module")
def unfused(groups: Groups) -> dict[str, Tensor]:
    """Gradients of two microbatches that autograd adds up."""
    spec = make_spec(CONFIG, groups, torch.device("cpu"))
    model = make_model(spec)
    backward(spec, model, [make_batch(10), make_batch(20)])
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()
            if parameter.grad is not None}


@pytest.mark.parametrize("recompute", [
    Recompute(), Recompute(layers=2), Recompute(inside="selective"), Recompute(inside="skip_attention"),
], ids=lambda recompute: recompute.inside or f"full-{recompute.layers}")
@pytest.mark.parametrize("overlap", [False, True])
def test_accumulated_gradients(
    groups: Groups, unfused: dict[str, Tensor], recompute: Recompute, overlap: bool
) -> None:
    spec = make_spec(CONFIG, groups, torch.device("cpu"))
    model = make_model(spec, recompute)
    (wrapped,) = wrap_data_parallel([model], ParallelArguments(overlap_grad_reduce=overlap))
    for _ in range(2):  # the second time buffers and marks are those of an iteration before
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            backward(spec, wrapped, [make_batch(10)])
        backward(spec, wrapped, [make_batch(20)])
        wrapped.finish_grad_sync()
        for name, parameter in model.named_parameters():
            assert_near(parameter.main_grad, unfused[name])  # type: ignore[attr-defined]
    added = {name for name, parameter in model.named_parameters() if parameter.grad_added_to_main_grad}
    assert added == {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LINEARS)}
    assert len(added) == 3 + 2 * 7


def test_bf16_gradients_by_a_product_that_sums_into_fp32(groups: Groups, unfused: dict[str, Tensor]) -> None:
    found = {}
    spec = make_spec(CONFIG, groups, torch.device("cpu"), bf16=True)
    for product in (fp64_product, no_product):
        model = make_model(spec)
        (wrapped,) = wrap_data_parallel([model], ParallelArguments())
        wrapped.zero_grad_buffer()
        for module in model.modules():
            if isinstance(module, LINEARS):
                module.add_weight_gradient = (  # type: ignore[method-assign]
                    lambda *tensors, product=product: add_weight_gradient(*tensors, product=product)
                )
        backward(spec, wrapped, [make_batch(10), make_batch(20)])
        found[product] = flat({name: parameter.main_grad for name, parameter in model.named_parameters()})
    exact = flat(unfused)
    assert (found[fp64_product] - exact).norm() < 0.02 * exact.norm()
    assert 1e-5 * exact.norm() < (found[fp64_product] - found[no_product]).norm() < 0.005 * exact.norm()


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def compare_with_whole(rank: int, sequence_parallel: bool, frozen: str) -> None:
    """A column- and a row-parallel linear on two ranks, and both whole in fp64."""
    parallel = ParallelArguments(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    with world(resolve_device("cpu"), detect_launch(os.environ), parallel) as groups:
        spec = make_spec(CONFIG, groups, torch.device("cpu"))
        first = column_parallel(spec.column_linear, 5, 6, spec.megatron, groups)
        second = row_parallel(spec.row_linear, 6, 5, spec.megatron, groups)
        whole = {"first.weight": draw(6, 5, seed=1), "first.bias": draw(6, seed=2), "second.weight": draw(5, 6, seed=3),
                 "second.bias": draw(5, seed=4)}
        exact = {name: tensor.double().requires_grad_(name != frozen) for name, tensor in whole.items()}
        own = {"first.weight": lambda tensor: tensor.chunk(2)[rank], "first.bias": lambda tensor: tensor.chunk(2)[rank],
               "second.weight": lambda tensor: tensor.chunk(2, dim=1)[rank], "second.bias": lambda tensor: tensor}
        modules = nn.ModuleDict({"first": first, "second": second})
        for name, parameter in modules.named_parameters():
            parameter.data.copy_(own[name](whole[name]))
            parameter.requires_grad_(name != frozen)
        tokens = (lambda tensor: tensor.chunk(2)[rank]) if sequence_parallel else (lambda tensor: tensor)
        rows, grad = draw(8, 2, 5, seed=5), draw(8, 2, 5, seed=6)
        ours, theirs = tokens(rows).clone().requires_grad_(), rows.double().requires_grad_()
        output = second(first(ours)[0].tanh())[0]
        expected = F.linear(F.linear(theirs, exact["first.weight"], exact["first.bias"]).tanh(),
                            exact["second.weight"], exact["second.bias"])
        output.backward(tokens(grad))
        expected.backward(grad.double())
        assert_near(output, tokens(expected))
        assert theirs.grad is not None
        assert_near(ours.grad, tokens(theirs.grad))
        for name, parameter in modules.named_parameters():
            reference = exact[name].grad
            if name == "second.bias" and sequence_parallel:  # of this rank's tokens
                reference = tokens(grad).double().sum((0, 1))
            assert_near(parameter.grad, None if reference is None else own[name](reference))


def every_case(rank: int) -> None:
    for sequence_parallel in (False, True):
        for frozen in ("", "first.weight", "second.weight"):
            compare_with_whole(rank, sequence_parallel, frozen)


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    run_ranks(every_case, 2, tmp_path)
