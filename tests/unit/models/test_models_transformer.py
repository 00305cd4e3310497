"""The DiT as a module: recomputation, precision, inputs that matter, batches of independent samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.flow.loss import mean_squared_error
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.models import transformer
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.recompute import Recompute
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

CONFIG = ModelConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, latent_channels=4, freq_dim=32,
    text_dim=24, text_length=5, phi_hidden_channels=8,
)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


@pytest.fixture(scope="module")
def make(groups: Groups) -> Callable[..., DiffusionTransformer]:
    """A model whose weights have no zeros, so that every input matters to the output."""

    def make(
        config: ModelConfig = CONFIG, recompute: Recompute | None = None, **precision: bool
    ) -> DiffusionTransformer:
        spec = make_spec(config, groups, torch.device("cpu"), **precision)
        model = DiffusionTransformer(spec, recompute=recompute)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
                offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def make_inputs(batch: int = 2, frames: int = 3) -> dict[str, Any]:
    """Arguments of :func:`predict_velocity`; the text rows are bf16, as prepared data holds them."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "latents_BCTHW": normal(batch, 4, frames, 4, 6),
        "timestep_B": torch.linspace(900.3, 31.7, batch),
        "text_BLX": normal(batch, 5, 24).to(BF16),
        "image_latents_BC1HW": normal(batch, 4, 1, 4, 6),
        "extras": {"cutoff_ratio": torch.linspace(0.1, 0.6, batch)},
    }


def change(inputs: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A function of every tensor, also within the extras."""
    return {name: change(value, function) if isinstance(value, dict) else function(value)
            for name, value in inputs.items()}


def gradients(model: DiffusionTransformer, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a mean squared error, by name."""
    model.train()
    target = torch.randn(inputs["latents_BCTHW"].shape, generator=torch.Generator().manual_seed(2))
    mean_squared_error(predict_velocity(model, **inputs), target).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    return found


@pytest.mark.parametrize("recompute, calls", [
    (Recompute(layers=3, group=1), [2, 2, 2]),  # uniform
    (Recompute(layers=3, group=2), [2, 2, 2]),  # uniform, a last group that is not full
    (Recompute(layers=2, group=1), [2, 2, 1]),  # block
    (Recompute(inside="skip_attention"), [1, 1, 1]),
    (Recompute(inside="selective"), [1, 1, 1]),
])
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputation_changes_no_bit(
    make: Callable[..., DiffusionTransformer], recompute: Recompute, calls: list[int], bf16: bool
) -> None:
    inputs = make_inputs()
    expected = gradients(make(bf16=bf16), inputs)
    model, counted = make(recompute=recompute, bf16=bf16), [0, 0, 0]
    for index, block in model.blocks.items():
        def count(*_: Any, number: int = int(index)) -> None:
            counted[number] += 1

        block.register_forward_pre_hook(count)  # recomputation may stop before a block ends
    found = gradients(model, inputs)
    assert counted == calls
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("inside, saved", [("selective", 0.81), ("skip_attention", 0.5)])
def test_recomputation_keeps_less(make: Callable[..., DiffusionTransformer], inside: str, saved: float) -> None:
    """Bytes that live between forward and backward, storages that were emptied not counted."""

    def kept(recompute: Recompute) -> int:
        model, storages = make(recompute=recompute).train(), {}

        def remember(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            velocity = predict_velocity(model, **make_inputs())
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        total = sum(storage.nbytes() for key, storage in storages.items() if key not in parameters)
        velocity.sum().backward()
        return total

    assert kept(Recompute(inside=inside)) < saved * kept(Recompute())


def test_attention_is_not_computed_again_where_it_is_skipped(make: Callable[..., DiffusionTransformer]) -> None:
    model, calls = make(recompute=Recompute(inside="skip_attention")), []
    for block in model.blocks.values():
        attend, norm = block.self_attention.attend, block.norm_cross
        block.self_attention.attend = lambda *rows, attend=attend: calls.append("attend") or attend(*rows)
        norm.register_forward_pre_hook(lambda *_: calls.append("norm"))
    gradients(model, make_inputs())
    assert (calls.count("attend"), calls.count("norm")) == (3, 6)


def test_nothing_is_recomputed_in_evaluation(make: Callable[..., DiffusionTransformer]) -> None:
    model, inputs = make(recompute=Recompute(layers=3)), make_inputs()
    with torch.no_grad():
        trained = predict_velocity(model.train(), **inputs)
        assert torch.equal(predict_velocity(model.eval(), **inputs), trained)


@torch.no_grad()
def test_samples_of_a_batch_do_not_know_each_other(make: Callable[..., DiffusionTransformer]) -> None:
    model, inputs = make(), make_inputs(batch=3)
    together = predict_velocity(model, **inputs)
    for index in range(3):
        alone = predict_velocity(model, **change(inputs, lambda value, index=index: value[index : index + 1]))
        torch.testing.assert_close(together[index : index + 1], alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", make_inputs())
def test_every_input_matters(make: Callable[..., DiffusionTransformer], name: str) -> None:
    model, inputs = make(), make_inputs()
    before = predict_velocity(model, **inputs)
    inputs |= change({name: inputs[name]}, lambda value: value * 0.5)
    assert (predict_velocity(model, **inputs) - before).abs().max() > 1e-3


@torch.no_grad()
def test_another_grid_follows_on_the_same_model(make: Callable[..., DiffusionTransformer]) -> None:
    """The rotary tables that the model keeps belong to one grid."""
    model = make()
    long, short = make_inputs(frames=5), make_inputs(frames=2)
    predict_velocity(model, **long)
    torch.testing.assert_close(predict_velocity(model, **short), predict_velocity(make(), **short), rtol=0, atol=0)


# Precision ------------------------------------------------------------------------------------------------------------

IN_BF16 = ("patch_embedding.", "text_embedding.", "conditioning.fourier_embedding.", ".linear_qkv.", ".linear_q.",
           ".linear_kv.", ".linear_proj.", ".linear_fc1.", ".linear_fc2.")


def test_which_weights_are_bf16(make: Callable[..., DiffusionTransformer]) -> None:
    for name, parameter in make(bf16=True).named_parameters():
        expected = BF16 if any(part in name for part in IN_BF16) else FP32
        assert parameter.dtype == expected, name
    assert {parameter.dtype for parameter in make().parameters()} == {FP32}


def record_dtypes(model: DiffusionTransformer) -> dict[str, tuple[list[torch.dtype], torch.dtype]]:
    """Filled by the next forward: dtypes of the floating-point inputs, and of the output, of each module."""
    seen: dict[str, tuple[list[torch.dtype], torch.dtype]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                seen[name] = ([value.dtype for value in inputs if isinstance(value, Tensor)], first.dtype)

        return keep

    for name, module in model.named_modules():
        module.register_forward_hook(hook(name))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("fp32_residual", [False, True])
def test_what_is_computed_in_which_precision(make: Callable[..., DiffusionTransformer], fp32_residual: bool) -> None:
    model = make(bf16=True, fp32_residual_connection=fp32_residual)
    seen = record_dtypes(model)
    conditioned: dict[str, Any] = {}
    model.conditioning.register_forward_hook(lambda module, inputs, output: conditioned.update(vars(output)))
    velocity = predict_velocity(model, **make_inputs())
    residual = FP32 if fp32_residual else BF16

    assert velocity.dtype == FP32 and seen["head"] == ([residual, FP32], FP32)
    assert seen["head.linear"] == ([FP32], FP32)
    assert seen["conditioning.phi"] == ([FP32], FP32)
    assert conditioned["latents_BCTHW"].dtype == FP32 and conditioned["guidance_BCTHW"].dtype == FP32
    assert seen["time_embedding"] == ([FP32], FP32)
    assert all(seen[f"time_embedding.{name}"] == ([FP32], FP32) for name in ("linear_1", "linear_2", "projection"))
    assert seen["patch_embedding"] == ([BF16], BF16) and seen["text_embedding"][1] == BF16
    for index in range(CONFIG.num_layers):
        block = f"blocks.{index}"
        hidden, text, modulation = seen[block][0]
        assert (hidden, text, modulation) == (residual, BF16, FP32) and seen[block][1] == residual
        assert seen[f"{block}.norm_cross"] == ([residual, BF16, FP32], residual)  # computed in fp32 inside the kernel
        assert seen[f"{block}.cross_attention.linear_q"] == ([BF16], BF16)  # reads its second output
        assert seen[f"{block}.self_attention.linear_qkv"] == ([BF16], BF16)
        assert seen[f"{block}.self_attention.linear_proj"] == ([BF16], BF16)
        for name in ("cross_attention", "mlp"):
            assert seen[f"{block}.{name}"][0][0] == BF16 and seen[f"{block}.{name}"][1] == BF16


@torch.no_grad()
def test_timesteps_are_not_rounded_under_bf16(make: Callable[..., DiffusionTransformer]) -> None:
    """bf16 would take 875.0 and 876.0 for the same."""
    model = make(bf16=True)
    sinusoid_BF = timestep_sinusoid(torch.tensor([875.0, 876.0]), CONFIG.freq_dim)
    rows = model.time_embedding(sinusoid_BF)
    assert (rows[:, 0] - rows[:, 1]).abs().amax(dim=-1).min() > 1e-3
    assert torch.equal(rows, make().time_embedding(sinusoid_BF))


def test_bf16_is_close_to_fp32(make: Callable[..., DiffusionTransformer]) -> None:
    inputs = make_inputs()
    with torch.no_grad():
        exact = predict_velocity(make(), **inputs)
        rounded = predict_velocity(make(bf16=True), **inputs)
        residual = predict_velocity(make(bf16=True, fp32_residual_connection=True), **inputs)
    errors = [((value - exact).norm() / exact.norm()).item() for value in (rounded, residual)]
    assert 1e-4 < max(errors) < 0.02, errors
    assert errors[1] < errors[0], errors
    exact_gradients, found = gradients(make(), inputs), gradients(make(bf16=True), inputs)
    for name, gradient in exact_gradients.items():
        assert found[name].isfinite().all(), name
        assert (found[name].float() - gradient).norm() < 0.15 * gradient.norm(), name


def test_both_orders_of_phi_differ_for_a_kernel_over_time_only(make: Callable[..., DiffusionTransformer]) -> None:
    inputs = make_inputs()
    for kernel, equal in (((1, 3, 3), True), ((3, 3, 3), False)):
        with torch.no_grad():
            first, second = (
                predict_velocity(
                    make(dataclasses.replace(CONFIG, phi_kernel_size=kernel, phi_order=order)), **inputs
                )
                for order in ("conv_then_broadcast", "repeat_then_conv")
            )
        assert torch.allclose(first, second, atol=1e-5) == equal


def test_rotary_tables_of_several_grids_are_kept(
    make: Callable[..., DiffusionTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    tables = transformer.rope_tables
    monkeypatch.setattr(transformer, "rope_tables", lambda grid, dim: made.append(grid) or tables(grid, dim))
    model, device = make(), torch.device("cpu")
    grids = [(1, 2, width) for width in range(1, transformer.KEPT_GRIDS + 2)]
    for grid in (*grids[:-1], *grids[:-1]):
        assert model.rotary(grid, device).cos_SR.shape[0] == grid[1] * grid[2]
    assert made == grids[:-1]
    model.rotary(grids[-1], device)
    model.rotary(grids[0], device)  # gave way to the newest
    assert made == [*grids, grids[0]] and model.rotary.cache_info().currsize == transformer.KEPT_GRIDS
