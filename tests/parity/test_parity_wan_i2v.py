"""Wan's image-to-video models against diffusers' WanTransformer3DModel with image rows: outputs, all gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers.reference_weights import assert_same_gradient, external_gradients, fill, random_weights

from megatron_flashi2v.conditioning.wan_i2v import GREY_CLIP, IMAGE_ROWS
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.formats.diffusers import transformer_config
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

# diffusers takes the last 512 rows for the text's, whatever the model.
CONFIG = ModelConfig(
    num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=4, latent_channels=4, freq_dim=32,
    text_dim=24, text_length=512, conditioning="wan_i2v", mask_channels=4, image_dim=40, image_rows=17,
)
FRAMES, HEIGHT, WIDTH = 3, 4, 6


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def make_theirs(config: ModelConfig, weights: dict[str, torch.Tensor]) -> WanTransformer3DModel:
    """diffusers' model with these weights, all of which it must have."""
    model = WanTransformer3DModel.from_config({**transformer_config(config), "rope_max_seq_len": 32})
    model.load_state_dict(weights, strict=True)
    return model


def folded_mask(batch: int) -> torch.Tensor:
    """Of the frames of a clip with the first one given, by the description: that frame four times, then by four."""
    frames = torch.zeros(batch, 4 * FRAMES, HEIGHT, WIDTH)
    frames[:, :4] = 1
    return frames.unflatten(1, (FRAMES, 4)).transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("image_dim", [40, 0], ids=["with CLIP rows", "without"])
def test_outputs_and_gradients(groups: Groups, image_dim: int, batch: int) -> None:
    config = ModelConfig.from_json({**CONFIG.to_json(), "image_dim": image_dim}, source="test")
    generator = torch.Generator().manual_seed(batch)
    weights = random_weights(config, "diffusers", generator)
    theirs = make_theirs(config, weights)
    ours = build_model(config, groups, resolve_device("cpu"))
    fill(ours, weights, "diffusers")

    shape = (batch, config.latent_channels, FRAMES, HEIGHT, WIDTH)
    latents, grey_clip, target = (torch.randn(shape, generator=generator) for _ in range(3))
    timestep_B = torch.linspace(987.5, 41.25, batch)
    text_BLX = torch.randn(batch, config.text_length, config.text_dim, generator=generator)
    text_BLX[:, 400:] = 0  # padding rows are attended to; of too many alike the keys' gradients would be roundings
    rows_BRX = torch.randn(batch, config.image_rows, 40, generator=generator)
    sides = [[tensor.clone().requires_grad_() for tensor in (latents, grey_clip, rows_BRX)] for _ in range(2)]

    (noisy, clip, rows), (their_noisy, their_clip, their_rows) = sides
    extras = {GREY_CLIP: clip, **({IMAGE_ROWS: rows} if image_dim else {})}
    velocity = predict_velocity(ours, noisy, timestep_B, text_BLX, latents[:, :, :1], extras)
    expected = theirs(
        torch.cat([their_noisy, folded_mask(batch), their_clip], dim=1), timestep_B, text_BLX,
        their_rows if image_dim else None, return_dict=False,
    )[0]
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
    for name, mine, its in zip(("latents", "clip", "rows")[: 3 if image_dim else 2], *sides, strict=False):
        assert_same_gradient(mine.grad, its.grad, name, relative=1e-4, floor=1e-4)
