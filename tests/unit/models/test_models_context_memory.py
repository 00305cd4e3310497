"""What is kept of a text between the steps of sampling changes no bit, and is computed once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from flashi2v_kernels.autograd import call
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.context_memory import ContextMemory
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.guidance import with_guidance
from megatron_flashi2v.sampling.load import velocity_of
from megatron_flashi2v.sampling.solvers import EulerSolver

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, latent_channels=3, text_dim=5,
    text_length=4, conditioning="text_to_video",
)
STEPS = 3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled() -> DiffusionTransformer:
    model = build_model(CONFIG, GROUPS[0], resolve_device("cpu")).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * draw(*parameter.shape, seed=number))
    return model


GROUPS: list = []


@pytest.fixture(autouse=True)
def alone():
    with single_process(resolve_device("cpu")) as groups:
        GROUPS[:] = [groups]
        yield


def sampled(velocity, text: Tensor, negative: Tensor, batched: bool = False) -> Tensor:
    conditions = Conditions(text_BLD=text, image_latents_BC1HW=torch.zeros(1, 3, 1, 4, 6), extras={})
    solver = EulerSolver(torch.linspace(1, 0, STEPS + 1))
    return denoise(velocity, draw(1, 3, 2, 4, 6, seed=1), conditions, solver,
                   guidance=lambda plain: with_guidance(plain, negative, 5.0, batched=batched))


@torch.no_grad()
def test_each_text_is_embedded_and_projected_once_for_the_same_bits() -> None:
    model, computed = filled(), Counter()
    for name, module in model.named_modules():
        if name.endswith(("linear_kv", "text_embedding")):
            module.register_forward_hook(lambda *_, name=name: computed.update([name]))
    velocity = velocity_of(model)
    for number in range(3):  # videos of other texts, with one memory
        text, negative = draw(1, 4, 5, seed=10 + number), draw(1, 4, 5, seed=20 + number)
        expected = sampled(lambda *inputs: predict_velocity(model, *inputs), text, negative)
        assert set(computed.values()) == {2 * STEPS} and len(computed) == 3
        computed.clear()
        assert torch.equal(sampled(velocity, text, negative), expected)
        assert set(computed.values()) == {2} and len(computed) == 3
        computed.clear()
        torch.testing.assert_close(sampled(velocity, text, negative, batched=True), expected, atol=1e-4, rtol=1e-4)
        assert set(computed.values()) == {1} and len(computed) == 3
        computed.clear()


def test_a_context_is_known_by_its_objects_and_the_oldest_is_forgotten() -> None:
    memory, extras = ContextMemory(), {}
    texts = [torch.zeros(1, 4, 5) for _ in range(3)]
    first, second = memory.of(texts[0], extras), memory.of(texts[1], extras)
    assert first is not second and memory.of(texts[0], extras) is first and memory.of(texts[1], extras) is second
    memory.of(texts[2], extras)
    assert memory.of(texts[1], extras) is second and memory.of(texts[0], extras) is not first
    assert memory.of(texts[1], {}) is not second  # the same text with the rows of another image


class Doubled(torch.autograd.Function):
    """An operator that looks at what its context offers, with a gradient that only its own backward gives."""

    @staticmethod
    def forward(ctx, x, unused):
        ctx.save_for_backward(x if ctx.needs_input_grad[0] else None)
        ctx.factor = 2
        return ctx.factor * x

    @staticmethod
    def backward(ctx, grad):
        assert ctx.saved_tensors[0] is not None and ctx.factor == 2
        return 5 * grad, None


def test_an_operator_is_the_same_with_and_without_gradients() -> None:
    x = draw(3, 4, seed=0).requires_grad_()
    with torch.no_grad():
        alone = call(Doubled, x, None)
    output = call(Doubled, x, None)
    output.sum().backward()
    assert torch.equal(alone, output) and not alone.requires_grad
    assert torch.equal(x.grad, torch.full_like(x, 5))
