"""The FLOP count against torch's counter, which watches operators, and against the published totals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.paradigms import PARADIGMS, stored_inputs
from torch.utils.flop_counter import FlopCounterMode

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.flops import forward_flops, training_flops
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

LATENT_SHAPE, BATCH = (3, 4, 6), 2
TOKENS = 3 * 2 * 3
def make_config(conditioning: str = "flashi2v", **fields: object) -> ModelConfig:
    return ModelConfig(
        num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=2, latent_channels=4, freq_dim=8,
        text_dim=12, text_length=5, phi_hidden_channels=8, conditioning=conditioning, **fields,
    )


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def make(config: ModelConfig, groups: Groups) -> DiffusionTransformer:
    # the plain attention is made of matrix products, which the counter knows in both directions
    model = build_model(config, groups, resolve_device("cpu"), attention_backend="reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def call(model: DiffusionTransformer) -> torch.Tensor:
    """Inputs with gradients, so that the first layers' backward is whole, too."""
    config = model.spec.config
    image_BC1HW = torch.randn(BATCH, 4, 1, *LATENT_SHAPE[1:])
    extras = {"cutoff_ratio": torch.full((BATCH,), 0.3), "image_noise": torch.randn(image_BC1HW.shape),
              "image_noise_level": torch.full((BATCH,), 0.1)}
    latents_BCTHW = torch.randn(BATCH, 4, *LATENT_SHAPE)
    extras.update(stored_inputs(config, latents_BCTHW))
    for tensor in extras.values():
        tensor.requires_grad_()
    return predict_velocity(
        model, latents_BCTHW.requires_grad_(), torch.full((BATCH,), 500.0),
        torch.randn(BATCH, config.text_length, config.text_dim).requires_grad_(), image_BC1HW.requires_grad_(), extras,
    )


@pytest.mark.parametrize("fields", [
    *({"conditioning": paradigm} for paradigm in PARADIGMS),
    {"phi_order": "repeat_then_conv", "phi_kernel_size": (3, 3, 3)},
    {"patch_size": (1, 2, 3)},
])
def test_forward_is_what_torch_counts(fields: dict, groups: Groups) -> None:
    config = make_config(**fields)
    model = make(config, groups)
    with FlopCounterMode(display=False) as counter:
        call(model)
    parts = forward_flops(config, LATENT_SHAPE, BATCH)
    assert counter.get_total_flops() == sum(parts.values())


def test_parts_are_what_torch_counts_in_their_modules(groups: Groups) -> None:
    config = make_config()
    model = make(config, groups)
    with FlopCounterMode(display=False, depth=8) as counter:
        call(model)
    counted = {name.partition(".")[2]: sum(by_operator.values())
               for name, by_operator in counter.get_flop_counts().items()}
    parts = forward_flops(config, LATENT_SHAPE, BATCH)
    for part, module in (("patch_embedding", "patch_embedding"), ("latent_shift", "conditioning.phi"),
                         ("fourier_embedding", "conditioning.fourier_embedding"), ("head", "head"),
                         ("text_embedding", "text_embedding"), ("time_embedding", "time_embedding")):
        assert parts[part] == counted[module] > 0, part

    def in_blocks(*modules: str) -> int:
        return sum(counted[".".join(("blocks", str(index), *filter(None, [module])))]
                   for index in range(2) for module in modules)

    assert parts["self_attention_linears"] == in_blocks("self_attention.linear_qkv", "self_attention.linear_proj")
    assert parts["cross_attention"] + parts["cross_attention_linears"] == in_blocks("cross_attention")
    assert parts["feed_forward"] == in_blocks("mlp")
    # The attention itself is no module of its own: it is what a block does besides.
    rest = parts["self_attention_linears"] + in_blocks("cross_attention", "mlp")
    assert parts["self_attention"] == in_blocks("") - rest


def test_training_is_what_torch_counts(groups: Groups) -> None:
    config = make_config()
    model = make(config, groups)
    with FlopCounterMode(display=False) as counter:
        call(model).square().sum().backward()
    # nothing asks for the gradients of the sinusoid and of the high-pass' result
    first_layers = 2 * BATCH * config.hidden_size * (config.freq_dim + TOKENS * config.patch_dim)
    assert counter.get_total_flops() == training_flops(config, LATENT_SHAPE, BATCH) - first_layers


@pytest.mark.parametrize(("name", "linears", "attention", "cross"), [
    ("1.3b", 50.9, 75.8, 1.9), ("14b", 487.1, 336.9, 8.5),
])
def test_wan_at_480p(name: str, linears: float, attention: float, cross: float) -> None:
    """TFLOP for 49 frames of 480x832 pixels (20,280 tokens), from 12 S d^2 + 4 T d^2 + 4 S d f, 4 S^2 d and 4 S T d."""
    parts = {part: flops / 1e12 for part, flops in forward_flops(PRESETS[name], (13, 60, 104)).items()}
    blocks = sum(parts[part] for part in ("self_attention_linears", "cross_attention_linears", "feed_forward"))
    assert blocks == pytest.approx(linears, rel=1e-3)
    assert parts["self_attention"] == pytest.approx(attention, abs=0.06)
    assert parts["cross_attention"] == pytest.approx(cross, abs=0.06)
