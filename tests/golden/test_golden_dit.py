"""The DiT against the reference's: output, activations, loss, gradients, counts, in both tiny configurations.

The plain forward feeds the patch embedding and the Fourier embedding directly, without phi and high-pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.reference_weights import (
    GOLDEN_CASES,
    assert_same_gradient,
    build_golden_model,
    external_gradients,
    golden_facts,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_flashi2v.conditioning.interface import ConditionedInput
from megatron_flashi2v.flow.loss import mean_squared_error
from megatron_flashi2v.models.patches import Grid
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device


@dataclass(frozen=True)
class PlainForward:
    """What the reference stored of one forward and backward pass, and what we computed."""

    stored: dict[str, Tensor]
    stored_gradients: dict[str, Tensor]
    facts: dict[str, Any]
    output: Tensor
    loss: Tensor
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    parameters: int


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


@pytest.fixture(scope="module", params=GOLDEN_CASES)
def run(request: pytest.FixtureRequest, goldens: Path, groups: Groups) -> PlainForward:
    case = request.param
    stored = load_file(goldens / f"dit_{case}.io.safetensors")
    model = build_golden_model(goldens, case, groups)
    # The stand-in for the conditioning's input side; its Fourier embedding stays.
    model.conditioning.forward = lambda *_: ConditionedInput(stored["x"], stored["fourier_features"])
    activations = record_activations(model, model.grid(tuple(stored["x"].shape[2:])))
    output = predict_velocity(model, stored["x"], stored["t"], stored["context"], None, None)
    loss = mean_squared_error(output, stored["target"])
    loss.backward()
    return PlainForward(
        stored=stored,
        stored_gradients=load_file(goldens / f"dit_{case}.grads.safetensors"),
        facts=golden_facts(goldens, case),
        output=output.detach(),
        loss=loss.detach(),
        activations=activations,
        gradients=external_gradients(model, "wan"),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def record_activations(model: DiffusionTransformer, grid: Grid) -> dict[str, Tensor]:
    """A dictionary that the next forward fills with our activations, under the reference's names and in its shapes."""
    recorded: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor, *, names: dict[str, Any]) -> None:
        for name, arrange in names.items():
            recorded[name] = arrange(output).detach()

    def on_grid(rows_SBD: Tensor) -> Tensor:
        return rows_SBD.permute(1, 2, 0).unflatten(2, grid)

    def batch_first(rows_SBD: Tensor) -> Tensor:
        return rows_SBD.transpose(0, 1)

    def hook(module: nn.Module, **names: Any) -> None:
        module.register_forward_hook(partial(keep, names=names))

    hook(model.patch_embedding, patch_embedding=on_grid)
    hook(model.conditioning.fourier_embedding, fourier_embedding=on_grid)
    hook(model.text_embedding, text_embedding=batch_first)
    hook(
        model.time_embedding,
        time_embedding=lambda rows_7BD: rows_7BD[0],
        time_projection=lambda rows_7BD: rows_7BD[1:].transpose(0, 1).flatten(1),
    )
    for index, block in model.blocks.items():
        hook(block, **{f"blocks.{index}": batch_first})
        hook(block.self_attention.linear_proj, **{f"blocks.{index}.self_attn": lambda output: batch_first(output[0])})
        hook(block.cross_attention, **{f"blocks.{index}.cross_attn": batch_first})
        hook(block.mlp, **{f"blocks.{index}.ffn": batch_first})
    hook(model.head, head=batch_first)
    return recorded


def test_output(run: PlainForward) -> None:
    assert run.stored["output"].std().item() == pytest.approx(run.facts["out_std"], rel=1e-4)
    torch.testing.assert_close(run.output, run.stored["output"], atol=2e-4, rtol=1e-4)


def test_every_stored_activation(run: PlainForward) -> None:
    for key, expected in run.stored.items():
        match = re.fullmatch(r"act\.(.+)", key)
        if match:
            torch.testing.assert_close(
                run.activations[match[1]], expected, atol=2e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_loss(run: PlainForward) -> None:
    assert run.loss.item() == pytest.approx(run.facts["loss"], rel=1e-5)
    torch.testing.assert_close(run.loss.view(1), run.stored["loss"], rtol=1e-5, atol=0)


def test_every_stored_gradient(run: PlainForward) -> None:
    for name, expected in run.stored_gradients.items():
        assert_same_gradient(run.gradients[name], expected, name, 1e-3)


def test_norms_of_all_gradients(run: PlainForward) -> None:
    norms = {name: gradient.norm() for name, gradient in run.gradients.items() if gradient is not None}
    assert norms.keys() == run.facts["grad_l2_per_param"].keys()
    for name, expected in run.facts["grad_l2_per_param"].items():
        assert norms[name].item() == pytest.approx(expected, rel=1e-3), name
    total = torch.stack(list(norms.values())).norm().item()
    assert total == pytest.approx(run.facts["global_grad_norm"], rel=1e-3)
    without = {name for name, gradient in run.gradients.items() if gradient is None}
    assert without == set(run.facts["params_without_grad_in_plain_forward"])


def test_number_of_parameters(run: PlainForward) -> None:
    assert run.parameters == run.facts["params"]
