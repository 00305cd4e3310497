"""One training loss against the reference's: our draws' formulas, conditioning, DiT and loss on the stored numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from torch import Tensor

from megatron_flashi2v.conditioning.interface import ConditionedInput
from megatron_flashi2v.config.train import DataArguments
from megatron_flashi2v.flow.highpass import cutoff_ratios
from megatron_flashi2v.flow.interpolation import interpolate, velocity_target
from megatron_flashi2v.flow.loss import mean_squared_error
from megatron_flashi2v.flow.sigmas import dynamic_shift, logit_normal_sigmas, shift_sigmas, timesteps_of
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

ONE_ULP = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class TrainingLoss:
    """What the reference stored of its training loss, and what we computed from the same draws."""

    stored: dict[str, Tensor]
    facts: dict[str, Any]
    ours: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


@pytest.fixture(scope="module", params=GOLDEN_CASES)
def run(request: pytest.FixtureRequest, goldens: Path, groups: Groups) -> TrainingLoss:
    stored = load_file(goldens / f"train_{request.param}.safetensors")
    model = build_golden_model(goldens, request.param, groups)
    seen: dict[str, Any] = {}
    model.conditioning.register_forward_hook(lambda module, inputs, output: seen.update(conditioned=output))
    model.conditioning.phi.register_forward_hook(lambda module, inputs, output: seen.update(shift=output))

    # The settings of the reference's run are the defaults of ours.
    data = DataArguments()
    assert (data.sigma_distribution, data.sigma_shift) == ("logit_normal", None)
    sigma_B = shift_sigmas(
        logit_normal_sigmas(stored["normal_draws"], data.sigma_logit_mean, data.sigma_logit_std),
        dynamic_shift(*stored["latents"].shape[-2:]),
    )
    ratio_B = cutoff_ratios(stored["uniform_draws"], data.cutoff_ratio_min, data.cutoff_ratio_max)
    output = predict_velocity(
        model,
        interpolate(stored["latents"], stored["noise"], sigma_B),
        timesteps_of(sigma_B),
        stored["text_embeddings"],
        stored["start_frame_latents"],
        {"cutoff_ratio": ratio_B},
    )
    target = velocity_target(stored["latents"], stored["noise"])
    loss = mean_squared_error(output, target)
    loss.backward()
    conditioned: ConditionedInput = seen["conditioned"]
    assert conditioned.guidance_BCTHW is not None
    ours = {
        "sigmas": sigma_B.view(-1, 1, 1, 1, 1),
        "timesteps": timesteps_of(sigma_B),
        "start_frame_proj": seen["shift"],
        "x_t": conditioned.latents_BCTHW,
        "fourier_features": conditioned.guidance_BCTHW,
        "model_output": output,
        "target": target,
        "loss": loss.view(1),
    }
    return TrainingLoss(
        stored=stored,
        facts=golden_facts(goldens, request.param),
        ours={name: value.detach() for name, value in ours.items()},
        gradients=external_gradients(model, "wan"),
    )


@pytest.mark.parametrize("name, absolute, relative", [
    ("sigmas", 0.0, ONE_ULP),
    ("timesteps", 0.0, ONE_ULP),
    ("target", 1e-6, 0.0),
    ("start_frame_proj", 1e-5, 0.0),
    ("x_t", 1e-5, 0.0),
    ("fourier_features", 1e-5, 0.0),
    ("model_output", 2e-4, 1e-4),
    ("loss", 0.0, 1e-5),
])
def test_forward(run: TrainingLoss, name: str, absolute: float, relative: float) -> None:
    torch.testing.assert_close(run.ours[name], run.stored[name], atol=absolute, rtol=relative)


def test_every_stored_result_is_compared(run: TrainingLoss) -> None:
    inputs = {"latents", "start_frame_latents", "text_embeddings", "noise", "normal_draws", "uniform_draws"}
    results = {name for name in run.stored if not name.startswith("grad.")}
    assert results == inputs | run.ours.keys()


def test_every_stored_gradient(run: TrainingLoss) -> None:
    stored = {name.removeprefix("grad."): value for name, value in run.stored.items() if name.startswith("grad.")}
    for name, expected in stored.items():
        assert_same_gradient(run.gradients[name], expected, name, 1e-3)


def test_loss_and_norms_of_all_gradients(run: TrainingLoss) -> None:
    assert run.ours["loss"].item() == pytest.approx(run.facts["train_loss"], rel=1e-5)
    assert run.gradients.keys() == run.facts["train_grad_l2_per_param"].keys()
    norms = {name: gradient.norm() for name, gradient in run.gradients.items() if gradient is not None}
    for name, expected in run.facts["train_grad_l2_per_param"].items():
        assert norms[name].item() == pytest.approx(expected, rel=1e-3), name
    total = torch.stack(list(norms.values())).norm().item()
    assert total == pytest.approx(run.facts["train_global_grad_norm"], rel=1e-3)
