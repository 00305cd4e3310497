"""Our text-to-video DiT against diffusers' WanTransformer3DModel: outputs and all gradients, fp32, random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers.reference_weights import assert_same_gradient, external_gradients, fill

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device


@dataclass(frozen=True)
class Case:
    """A model, a latent size and a microbatch."""

    name: str
    heads: int
    latent_shape: tuple[int, int, int]
    batch: int
    patch_size: tuple[int, int, int] = (1, 2, 2)


# Width 96: 4 heads of 24 split their rotary channels equally over time, height and width (8, 8, 8), 3 heads of 32 do
# not (12, 10, 10).
CASES = [
    Case("heads of 24, one frame", 4, (1, 4, 4), 1),
    Case("heads of 24, wide", 4, (3, 4, 10), 2),
    Case("heads of 24, long", 4, (6, 2, 2), 3),
    Case("heads of 32, tall", 3, (2, 8, 4), 1),
    Case("heads of 32, odd grid", 3, (5, 6, 10), 2),
    Case("heads of 32, three samples", 3, (3, 4, 6), 3),
    Case("patches over time and oblong", 3, (4, 4, 9), 2, patch_size=(2, 2, 3)),
]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def make_config(case: Case) -> ModelConfig:
    return ModelConfig(
        num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=case.heads, latent_channels=4,
        patch_size=case.patch_size, freq_dim=32, text_dim=24, text_length=7, conditioning="text_to_video",
    )


def make_theirs(config: ModelConfig, generator: torch.Generator) -> WanTransformer3DModel:
    """diffusers' model without a zero or a one left among its weights."""
    model = WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.head_dim, in_channels=config.latent_channels, out_channels=config.latent_channels,
        text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_hidden_size,
        num_layers=config.num_layers, rope_max_seq_len=32,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients(case: Case, groups: Groups) -> None:
    generator = torch.Generator().manual_seed(len(case.name))
    config = make_config(case)
    theirs = make_theirs(config, generator)
    ours = build_model(config, groups, resolve_device("cpu"))
    fill(ours, theirs.state_dict(), "diffusers")

    latents_BCTHW = torch.randn(case.batch, config.latent_channels, *case.latent_shape, generator=generator)
    timestep_B = torch.linspace(987.5, 41.25, case.batch)
    text_BLX = torch.randn(case.batch, config.text_length, config.text_dim, generator=generator)
    text_BLX[:, -2:] = 0  # padding rows are attended to as well
    target = torch.randn(latents_BCTHW.shape, generator=generator)
    ours_in, theirs_in = latents_BCTHW.clone().requires_grad_(), latents_BCTHW.clone().requires_grad_()

    velocity = predict_velocity(ours, ours_in, timestep_B, text_BLX, None, None)
    expected = theirs(theirs_in, timestep_B, text_BLX, return_dict=False)[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(velocity, expected, atol=2e-5, rtol=2e-5)

    (velocity - target).square().mean().backward()
    (expected - target).square().mean().backward()
    gradients = external_gradients(ours, "diffusers")
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, f"{name} has no gradient, so it proves nothing"
        assert_same_gradient(gradients[name], gradient, name, relative=1e-4, floor=1e-4)
    assert_same_gradient(ours_in.grad, theirs_in.grad, "latents", relative=1e-4, floor=1e-4)
