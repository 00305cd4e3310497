"""The table of names against the real diffusers model, the stated counts, and itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import WanTransformer3DModel

from megatron_flashi2v.checkpoint.key_table import EXTERNAL_COLUMNS, mappings, parameter_count, parameter_shapes
from megatron_flashi2v.config.model import ModelConfig

# Sizes that are all different, with an odd number of heads, so that no two dimensions can be confused.
ODD = ModelConfig(
    num_layers=2,
    hidden_size=30,
    ffn_hidden_size=22,
    num_attention_heads=3,
    latent_channels=4,
    patch_size=(1, 2, 3),
    freq_dim=16,
    text_dim=14,
    text_length=6,
    phi_hidden_channels=5,
    phi_kernel_size=(3, 5, 7),
)
T2V = dataclasses.replace(ODD, conditioning="text_to_video")
SMALL = ModelConfig(num_layers=30, hidden_size=1536, ffn_hidden_size=8960, num_attention_heads=12)
LARGE = ModelConfig(num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40)


def variant(config: ModelConfig, **changes: object) -> ModelConfig:
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        (variant(SMALL, conditioning="text_to_video"), 1_418_996_800, 825),
        (SMALL, 1_421_475_984, 833),
        (variant(SMALL, phi_kernel_size=(3, 3, 3)), 1_421_512_848, 833),
        (variant(LARGE, conditioning="text_to_video"), 14_288_491_584, 1095),
        (LARGE, 14_315_062_416, 1103),
        (variant(LARGE, phi_kernel_size=(3, 3, 3)), 14_315_099_280, 1103),
    ],
)
def test_parameter_counts(config: ModelConfig, parameters: int, tensors: int) -> None:
    assert parameter_count(config) == parameters
    assert sum(len(mapped.external) for mapped in mappings(config, "wan")) == tensors


def diffusers_model(config: ModelConfig) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_hidden_size,
            num_layers=config.num_layers,
            rope_max_seq_len=8,
        )


def test_diffusers_names_and_shapes_are_those_of_the_real_model() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in diffusers_model(ODD).state_dict().items()}
    mapped = {name: entry.external_shape for entry in mappings(ODD, "diffusers") for name in entry.external}
    assert mapped == expected


@pytest.mark.parametrize("column", EXTERNAL_COLUMNS)
def test_every_tensor_maps_once_and_back_bit_for_bit(column: str) -> None:
    config = T2V if column == "diffusers" else ODD
    generator = torch.Generator().manual_seed(0)
    ours = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}
    entries = list(mappings(config, column))
    assert [entry.ours for entry in entries] == list(ours)
    names = [name for entry in entries for name in entry.external]
    assert len(names) == len(set(names)) and not any("{" in name for name in names)
    for entry in entries:
        tensor = ours[entry.ours]
        external = entry.to_external(tensor)
        assert [tuple(part.shape) for part in external] == [entry.external_shape] * len(entry.external)
        assert sum(part.numel() for part in external) == tensor.numel()
        assert torch.equal(entry.to_ours(external), tensor)


def test_only_image_conditioning_has_no_place_in_diffusers() -> None:
    held = {entry.ours for entry in mappings(ODD, "diffusers")}
    left_out = set(parameter_shapes(ODD)) - held
    assert len(left_out) == 8 and all(name.startswith("conditioning.") for name in left_out)
    assert held == set(parameter_shapes(T2V))


def test_fused_rows_are_ordered_head_part_channel() -> None:
    heads, width, d = ODD.num_attention_heads, ODD.head_dim, ODD.hidden_size
    entries = {entry.ours: entry for entry in mappings(ODD, "wan")}
    for name, parts in (("self_attention.linear_qkv", "qkv"), ("cross_attention.linear_kv", "kv")):
        entry = entries[f"blocks.1.{name}.weight"]
        prefix = f"blocks.1.{'self_attn' if 'qkv' in name else 'cross_attn'}"
        assert entry.external == tuple(f"{prefix}.{part}.weight" for part in parts)
        rows = torch.arange(len(parts) * d).reshape(-1, 1).expand(-1, d)  # every row holds its own number
        for number, tensor in enumerate(entry.to_external(rows)):
            expected = [
                head * len(parts) * width + number * width + channel
                for head in range(heads)
                for channel in range(width)
            ]
            assert tensor[:, 0].tolist() == expected


def test_patch_rows_are_the_convolution_flattened() -> None:
    entry = next(entry for entry in mappings(ODD, "wan") if entry.ours == "patch_embedding.weight")
    conv = torch.nn.Conv3d(4, 30, (1, 2, 3), stride=(1, 2, 3))
    latents = torch.randn(1, 4, 1, 2, 3)
    weight = entry.to_ours((conv.weight.detach(),))
    by_matrix = weight @ latents.flatten() + conv.bias
    assert torch.allclose(by_matrix, conv(latents).flatten(), atol=1e-6)
    assert weight.shape == (30, math.prod((4, 1, 2, 3)))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="flashi2v_npu"):
        list(mappings(ODD, "onnx"))


@pytest.mark.parametrize(
    ("ours", "wan", "npu"),
    [
        ("conditioning.phi.conv_in.weight", "learnable_proj.proj.0.weight", "learnable_proj.0.weight"),
        ("conditioning.phi.conv_out.bias", "learnable_proj.proj.2.bias", "learnable_proj.2.bias"),
        ("text_embedding.linear_2.weight", "text_embedding.2.weight", "text_embedding.linear_2.weight"),
        ("time_embedding.projection.bias", "time_projection.1.bias", "time_projection.1.bias"),
        ("blocks.1.modulation", "blocks.1.modulation", "blocks.1.modulation"),
        (
            "blocks.0.cross_attention.linear_q.weight",
            "blocks.0.cross_attn.q.weight",
            "blocks.0.cross_attn.proj_q.weight",
        ),
        (
            "blocks.0.self_attention.norm_k.weight",
            "blocks.0.self_attn.norm_k.weight",
            "blocks.0.self_attn.k_norm.weight",
        ),
        (
            "blocks.0.self_attention.linear_proj.bias",
            "blocks.0.self_attn.o.bias",
            "blocks.0.self_attn.proj_out.bias",
        ),
        ("blocks.1.norm_cross.bias", "blocks.1.norm3.bias", "blocks.1.norm3.bias"),
        ("head.linear.weight", "head.head.weight", "head.head.weight"),
    ],
)
def test_names_of_the_flashi2v_branches(ours: str, wan: str, npu: str) -> None:
    assert {entry.ours: entry.external for entry in mappings(ODD, "wan")}[ours] == (wan,)
    assert {entry.ours: entry.external for entry in mappings(ODD, "flashi2v_npu")}[ours] == (npu,)
