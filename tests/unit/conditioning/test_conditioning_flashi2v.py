"""FlashI2V's formula: the shift, the features, where gradients go, and what stays in fp32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_flashi2v.conditioning.build import build_conditioning
from megatron_flashi2v.conditioning.flashi2v import FlashI2V, LatentShift
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.flow.highpass import high_frequency_features

CONFIG = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=4, phi_hidden_channels=6
)


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def plain_highpass(image_BCHW: Tensor, ratio_B: Tensor, *, return_abs: bool) -> Tensor:
    """A stand-in that can be told apart from the real one."""
    assert return_abs
    return image_BCHW.abs() * ratio_B.view(-1, 1, 1, 1)


@pytest.fixture
def module() -> FlashI2V:
    built = build_conditioning(CONFIG, plain_highpass, torch.float32)
    assert isinstance(built, FlashI2V)
    randomise(built)
    return built


def inputs(frames: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    noisy, image = (torch.randn(2, 4, count, 5, 7, generator=generator) for count in (frames, 1))
    return noisy, image, {"cutoff_ratio": torch.tensor([0.2, 0.7])}


def test_latents_are_shifted_by_phi_of_the_image(module: FlashI2V) -> None:
    noisy, image, extras = inputs()
    first, last = module.phi.conv_in, module.phi.conv_out
    shift_BCHW = F.conv2d(
        F.silu(F.conv2d(image[:, :, 0], first.weight[:, :, 0], first.bias, padding=1)),
        last.weight[:, :, 0], last.bias, padding=1,
    )
    assert shift_BCHW.abs().max() > 0.1
    shifted = module(noisy, image, extras).latents_BCTHW
    torch.testing.assert_close(shifted, noisy - shift_BCHW.unsqueeze(2))
    assert module.input_channels == 4


def test_features_are_those_of_the_image_with_each_samples_ratio_on_every_frame(module: FlashI2V) -> None:
    noisy, image, extras = inputs(frames=4)
    features = module(noisy, image, extras).guidance_BCTHW
    assert features is not None and features.shape == noisy.shape
    for frame in range(4):
        expected = plain_highpass(image[:, :, 0], extras["cutoff_ratio"], return_abs=True)
        assert torch.equal(features[:, :, frame], expected)


def test_features_are_the_high_pass_of_the_flow_layer() -> None:
    noisy, image, extras = inputs()
    module = build_conditioning(CONFIG, None, torch.float32)  # None: the flow layer picks the best one
    features = module(noisy, image, extras).guidance_BCTHW
    assert features is not None
    assert torch.equal(features[:, :, 1], high_frequency_features(image[:, :, 0], extras["cutoff_ratio"]))


def test_embedding_is_two_linears_without_an_activation(module: FlashI2V) -> None:
    patches = torch.randn(6, 2, CONFIG.patch_dim, generator=torch.Generator().manual_seed(2))
    first, last = module.fourier_embedding.conv_in, module.fourier_embedding.conv_out
    expected = (patches @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(module.embed_guidance(patches), expected)
    assert module.token_modules == ("fourier_embedding",)


def test_gradients_reach_phi_through_the_input_alone(module: FlashI2V) -> None:
    noisy, image, extras = inputs()
    image.requires_grad_()
    conditioned = module(noisy, image, extras)
    assert not conditioned.guidance_BCTHW.requires_grad
    conditioned.latents_BCTHW.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.phi.parameters())
    assert all(parameter.grad is None for parameter in module.fourier_embedding.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phi_and_features_are_fp32_whatever_the_inputs(dtype: torch.dtype) -> None:
    module = build_conditioning(CONFIG, plain_highpass, dtype)
    randomise(module)
    assert {parameter.dtype for parameter in module.phi.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in module.fourier_embedding.parameters()} == {dtype}
    noisy, image, extras = inputs()
    conditioned = module(noisy.to(dtype), image.to(dtype), extras)
    assert conditioned.latents_BCTHW.dtype == conditioned.guidance_BCTHW.dtype == torch.float32
    exact = noisy.to(dtype).float() - module.phi(image.to(dtype).float(), 3)
    assert torch.equal(conditioned.latents_BCTHW, exact)  # the difference itself is not rounded
    assert module.embed_guidance(torch.ones(1, 1, CONFIG.patch_dim)).dtype == dtype


@pytest.mark.parametrize("order, frames", [("conv_then_broadcast", 1), ("repeat_then_conv", 5)])
def test_order_of_phi(order: str, frames: int) -> None:
    """A kernel over time sees zeros around one frame, and its neighbours in a repeated one."""
    config = dataclasses.replace(CONFIG, phi_kernel_size=(3, 3, 3), phi_order=order)
    phi = LatentShift(config)
    randomise(phi)
    _, image, _ = inputs()
    shift = phi(image, 5)
    assert shift.shape == (2, 4, frames, 5, 7)
    on_single = phi.conv_out(F.silu(phi.conv_in(image)))
    if order == "conv_then_broadcast":
        torch.testing.assert_close(shift, on_single)
    else:
        on_repeated = phi.conv_out(F.silu(phi.conv_in(image.repeat(1, 1, 5, 1, 1))))
        torch.testing.assert_close(shift, on_repeated)
        assert (shift[:, :, 2:3] - on_single).abs().max() > 0.1
