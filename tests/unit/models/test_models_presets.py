"""The presets have the published sizes, and the table of names describes the models that are built."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from helpers.paradigms import PARADIGMS

from megatron_flashi2v.checkpoint.key_table import parameter_count, parameter_shapes
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ModelArguments
from megatron_flashi2v.models.presets import PRESETS, resolve_model
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

META = torch.device("meta")
KERNELS = {"1x3x3": (1, 3, 3), "3x3x3": (3, 3, 3)}
# 1.3b and 14b: parameters of the reference, counted by running it; the text-to-video part is diffusers' count as well.
# The other rungs: from the reference's formula, which its own sizes confirm.
COUNTS = {
    ("1.3b", "text_to_video", "1x3x3"): 1_418_996_800,
    ("1.3b", "flashi2v", "1x3x3"): 1_421_475_984,
    ("1.3b", "flashi2v", "3x3x3"): 1_421_512_848,
    ("14b", "text_to_video", "1x3x3"): 14_288_491_584,
    ("14b", "flashi2v", "1x3x3"): 14_315_062_416,
    ("14b", "flashi2v", "3x3x3"): 14_315_099_280,
    ("130m", "text_to_video", "1x3x3"): 130_558_528,
    ("130m", "flashi2v", "1x3x3"): 130_872_976,
    ("300m", "text_to_video", "1x3x3"): 291_782_464,
    ("300m", "flashi2v", "1x3x3"): 292_441_488,
    ("600m", "text_to_video", "1x3x3"): 600_966_208,
    ("600m", "flashi2v", "1x3x3"): 602_100_880,
    ("3b", "text_to_video", "1x3x3"): 3_290_237_504,
    ("3b", "flashi2v", "1x3x3"): 3_296_978_576,
    ("7b", "text_to_video", "1x3x3"): 7_327_845_440,
    ("7b", "flashi2v", "1x3x3"): 7_344_911_504,
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
    for conditioning in PARADIGMS:
        config = dataclasses.replace(PRESETS[name], conditioning=conditioning)
        parameters = build_on_meta(config, groups, monkeypatch).named_parameters()
        shapes = {key: tuple(value.shape) for key, value in parameters}
        assert shapes == parameter_shapes(config), conditioning


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_counts_follow_the_published_formula(name: str) -> None:
    """Per block 8 d^2 + 2 d f + 21 d + f; outside the patch, text, time and head layers; then what paradigms add."""
    config = PRESETS[name]
    d, f, layers = config.hidden_size, config.ffn_hidden_size, config.num_layers
    outside = 65 * d + (4096 * d + d * d + 2 * d) + (256 * d + d * d + 2 * d) + (6 * d * d + 6 * d) + 66 * d + 64
    expected = layers * (8 * d * d + 2 * d * f + 21 * d + f) + outside
    added = {
        "text_to_video": 0, "flashi2v": 65 * d + d * d + d + 2048 * 9 + 80, "repeat_concat": 64 * d,
        "zero_pad_concat": 64 * d, "inpainting": (4 + 16) * 4 * d,
        "wan_i2v": (4 + 16) * 4 * d + 1280**2 + 3 * 1280 + 1280 * d + 3 * d + layers * (2 * d * d + 3 * d),
    }
    for conditioning, more in added.items():
        assert parameter_count(dataclasses.replace(config, conditioning=conditioning)) == expected + more, conditioning


def test_the_ladder_is_even() -> None:
    """Rungs double and a bit; heads are whole; the feed-forward's share falls without a jump."""
    rungs = [config for name, config in PRESETS.items() if name != "tiny"]
    counts = [parameter_count(dataclasses.replace(config, conditioning="text_to_video")) for config in rungs]
    assert all(1.9 < high / low < 2.4 for low, high in itertools.pairwise(counts))
    ratios = [config.ffn_hidden_size / config.hidden_size for config in rungs]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] <= 6 and ratios[-1] == 2.7
    for name, config in PRESETS.items():
        assert config.head_dim == (24 if name == "tiny" else 64 if name in ("130m", "300m") else 128), name
        tensor = 8 if name in ("tiny", "130m", "600m", "7b", "14b") else 4
        assert config.num_attention_heads % tensor == config.ffn_hidden_size % tensor == 0, name


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
