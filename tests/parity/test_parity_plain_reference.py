"""Our FlashI2V against the plain reference (helpers/plain_flashi2v.py): shapes and batches that no golden has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers.plain_flashi2v import PlainFlashI2V, euler_states, guided, shifted_sigmas
from helpers.reference_weights import assert_same_gradient, external_gradients, fill, plain_model, random_weights
from torch import Tensor

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.flow.interpolation import interpolate, velocity_target
from megatron_flashi2v.flow.loss import mean_squared_error
from megatron_flashi2v.flow.sigmas import inference_sigmas, timesteps_of
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.guidance import with_guidance
from megatron_flashi2v.sampling.load import velocity_of
from megatron_flashi2v.sampling.solvers import EulerSolver

SAMPLE = {"latent_channels": 4, "freq_dim": 32, "text_dim": 24, "text_length": 7}
FIRST, LAST = "conv_then_broadcast", "repeat_then_conv"


@dataclass(frozen=True)
class Case:
    """A model, a latent size and a microbatch; heads of 24 split their rotary channels evenly, others do not."""

    name: str
    heads: int
    latent_shape: tuple[int, int, int]
    batch: int
    kernel: tuple[int, int, int] = (1, 3, 3)
    order: str = FIRST
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=self.heads,
            phi_kernel_size=self.kernel, phi_order=self.order, phi_hidden_channels=12, patch_size=self.patch_size,
            **SAMPLE,
        )


CASES = [
    Case("one frame", 4, (1, 6, 4), 1),
    Case("wide", 3, (4, 4, 10), 2, order=LAST),
    Case("tall, 3x3x3 alone", 4, (3, 10, 4), 3, kernel=(3, 3, 3)),
    Case("odd grid, 3x3x3 repeated", 3, (5, 6, 10), 2, kernel=(3, 3, 3), order=LAST),
    Case("one sample, 3x3x3 repeated", 6, (6, 4, 6), 1, kernel=(3, 3, 3), order=LAST),
    Case("three samples", 2, (2, 6, 8), 3),
    Case("patches over time and oblong", 4, (4, 4, 9), 2, kernel=(3, 3, 3), order=LAST, patch_size=(2, 2, 3)),
]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def both_models(case: Case, groups: Groups, generator: torch.Generator) -> tuple[DiffusionTransformer, PlainFlashI2V]:
    """The same random weights in ours, fp32, and in the plain reference, fp64."""
    weights = random_weights(case.config, "wan", generator)
    ours = build_model(case.config, groups, resolve_device("cpu"))
    fill(ours, weights, "wan")
    return ours, plain_model(case.config, weights)


def draw(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch; latents that resemble a video's, and text whose last rows are padding."""
    config = case.config
    shape = (case.batch, config.latent_channels, *case.latent_shape)
    text_BLX = torch.randn(case.batch, config.text_length, config.text_dim, generator=generator)
    text_BLX[:, -2:] = 0
    return {
        "latents": torch.randn(shape, generator=generator).cumsum(-1).cumsum(-2) / 4,
        "noise": torch.randn(shape, generator=generator),
        "sigma": torch.rand(case.batch, generator=generator),
        "text": text_BLX,
        "ratio": torch.linspace(0.15, 0.85, case.batch),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_loss_output_and_gradients(case: Case, groups: Groups) -> None:
    generator = torch.Generator().manual_seed(len(case.name))
    ours, plain = both_models(case, groups, generator)
    batch = draw(case, generator)
    latents, noise = batch["latents"], batch["noise"]

    velocity = predict_velocity(
        ours, interpolate(latents, noise, batch["sigma"]), timesteps_of(batch["sigma"]), batch["text"],
        latents[:, :, :1], {"cutoff_ratio": batch["ratio"]},
    )
    loss = mean_squared_error(velocity, velocity_target(latents, noise))
    loss.backward()

    exact: dict[str, Any] = {name: tensor.double() for name, tensor in batch.items()}
    sigma = exact["sigma"].view(-1, 1, 1, 1, 1)
    image = exact["latents"][:, :, :1]
    expected = plain.velocity(
        sigma * exact["noise"] + (1 - sigma) * exact["latents"], 1000 * exact["sigma"], exact["text"], image,
        exact["ratio"],
    )
    expected_loss = plain.loss(
        exact["latents"], exact["noise"], exact["sigma"], exact["text"], image, exact["ratio"]
    )
    expected_loss.backward()

    assert expected.std() > 0.3
    torch.testing.assert_close(velocity, expected.float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(loss, expected_loss.float(), atol=0, rtol=1e-6)
    gradients = external_gradients(ours, "wan")
    assert gradients.keys() == plain.weights.keys()
    for name, leaf in plain.weights.items():
        assert leaf.grad is not None and leaf.grad.norm() > 0, f"{name} has no gradient, so it proves nothing"
        assert_same_gradient(gradients[name], leaf.grad.float(), name, relative=1e-4, floor=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=lambda case: case.name)
@pytest.mark.parametrize("steps, shift, scale", [(3, 5.0, 4.0), (5, 1.0, 1.0)])
def test_sampling(case: Case, groups: Groups, steps: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(steps)
    ours, plain = both_models(case, groups, generator)
    batch = draw(case, generator)
    image, negative = batch["latents"][:, :, :1], torch.randn(batch["text"].shape, generator=generator)

    conditions = Conditions(
        text_BLD=batch["text"], image_latents_BC1HW=image, extras={"cutoff_ratio": batch["ratio"]}
    )
    found = denoise(
        velocity_of(ours), batch["noise"], conditions, EulerSolver(inference_sigmas(steps, shift)),
        guidance=partial(with_guidance, negative_text_BLD=negative, guidance_scale=scale),
    )
    with_text = (
        lambda state, timestep_B, rows=rows: plain.velocity(
            state, timestep_B, rows.double(), image.double(), batch["ratio"].double()
        )
        for rows in (batch["text"], negative)
    )
    states = euler_states(guided(*with_text, scale), batch["noise"].double(), shifted_sigmas(steps, shift))
    assert len(states) == steps
    torch.testing.assert_close(found, states[-1].float(), atol=2e-4, rtol=2e-5)
