"""The presets have the published sizes, and the table of names describes the models that are built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ModelArguments
from megatron_flashi2v.models.presets import PRESETS, resolve_model
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.load import single_process

META = torch.device("meta")
KERNELS = {"1x3x3": (1, 3, 3), "3x3x3": (3, 3, 3)}
# Parameters of the reference, counted by running it; the text-to-video part is diffusers' count as well.
COUNTS = {
    ("1.3b", "text_to_video", "1x3x3"): 1_418_996_800,
    ("1.3b", "flashi2v", "1x3x3"): 1_421_475_984,
    ("1.3b", "flashi2v", "3x3x3"): 1_421_512_848,
    ("14b", "text_to_video", "1x3x3"): 14_288_491_584,
    ("14b", "flashi2v", "1x3x3"): 14_315_062_416,
    ("14b", "flashi2v", "3x3x3"): 14_315_099_280,
}


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def build_on_meta(config: ModelConfig, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> DiffusionTransformer:
    """The model without memory; megatron-core names the device itself, so its answer is exchanged too."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: META)
    with META:
        return DiffusionTransformer(make_spec(config, groups, torch.device("cpu")))


@pytest.mark.parametrize("preset, conditioning, kernel", COUNTS)
def test_built_model_has_the_published_number_of_parameters(
    preset: str, conditioning: str, kernel: str, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve_model(ModelArguments(model=preset, conditioning=conditioning, phi_kernel=kernel))
    assert (config.conditioning, config.phi_kernel_size) == (conditioning, KERNELS[kernel])
    model = build_on_meta(config, groups, monkeypatch)
    assert all(parameter.device == META for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[preset, conditioning, kernel]
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == parameter_shapes(config)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_with_the_tables_names_and_shapes(
    name: str, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PRESETS[name]
    shapes = {key: tuple(value.shape) for key, value in build_on_meta(config, groups, monkeypatch).named_parameters()}
    assert shapes == parameter_shapes(config)


def test_tiny_is_laid_out_for_many_small_layouts() -> None:
    tiny = PRESETS["tiny"]
    assert tiny.num_attention_heads % 4 == 0 and tiny.ffn_hidden_size % 4 == 0  # TP 4, Ulysses 4
    assert tiny.num_layers % 4 == 0  # PP 2 x virtual 2
    assert sum(map(math.prod, parameter_shapes(tiny).values())) < 10_000_000


def test_flags_override_the_preset() -> None:
    config = resolve_model(ModelArguments(
        model="TINY", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, text_dim=8,
        text_length=5, latent_channels=6, phi_kernel="3x3x3", phi_order="repeat_then_conv",
    ))
    assert config == dataclasses.replace(
        PRESETS["tiny"], num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, text_dim=8,
        text_length=5, latent_channels=6, phi_kernel_size=(3, 3, 3), phi_order="repeat_then_conv",
    )


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--model 14: choose one of tiny.*did you mean 14b\?"):
        resolve_model(ModelArguments(model="14"))
