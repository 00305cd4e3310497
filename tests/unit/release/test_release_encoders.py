"""Wan's own encoder files as folders: the library's class loads them, and gives what it gave before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer
from transformers import UMT5EncoderModel

from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.folders import require_files

T5 = "models_t5_umt5-xxl-enc-bf16.pth"


def t5_file(model: UMT5EncoderModel) -> dict[str, torch.Tensor]:
    """A text encoder under Wan's names."""
    inner = (
        ("layer.0.layer_norm", "norm1"), ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention", "attn"), ("layer.1.layer_norm", "norm2"),
        ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1", "ffn.fc1"), ("layer.1.DenseReluDense.wo", "ffn.fc2"),
        ("encoder.block", "blocks"), ("encoder.final_layer_norm", "norm"), ("shared", "token_embedding"),
    )  # fmt: skip
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "embed_tokens" not in name:
            for theirs, wans in inner:
                name = name.replace(theirs, wans)
            tensors[name] = tensor.bfloat16()
    return tensors


def vae_name(name: str) -> str:
    """A diffusers VAE's name in Wan's file."""
    for theirs, wans in (
        ("post_quant_conv", "conv2"), ("quant_conv", "conv1"), (".conv_in.", ".conv1."), (".norm_out.", ".head.0."),
        (".conv_out.", ".head.2."), ("mid_block.resnets.0", "middle.0"), ("mid_block.resnets.1", "middle.2"),
        ("mid_block.attentions.0", "middle.1"), ("down_blocks", "downsamples"), ("conv_shortcut", "shortcut"),
    ):  # fmt: skip
        name = name.replace(theirs, wans)
    # Three residual blocks and an upsampler for each level.
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
    if re.match(r"(en|de)coder\.(middle\.[02]|(up|down)samples)", name):
        for theirs, wans in (("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"),
                             ("conv2", "residual.6")):  # fmt: skip
            name = name.replace(theirs, wans)
    return name


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Wan released it, of small encoders; beside it the models that the files were made from."""
    root = tmp_path_factory.mktemp("wan")
    (root / "wan" / "google").mkdir(parents=True)
    make_tiny_tokenizer(root / "wan" / "google" / "umt5-xxl")
    torch.save(t5_file(UMT5EncoderModel.from_pretrained(make_tiny_text_encoder(root / "t5"))), root / "wan" / T5)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8)
    vae.save_pretrained(root / "vae")
    torch.save({vae_name(name): value for name, value in vae.state_dict().items()}, root / "wan" / "Wan2.1_VAE.pth")
    return root


def test_encoders_come_out_bit_for_bit(released: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoders"
    command = ["convert", "--from", "wan", str(released / "wan"), "--to", "encoders", str(out)]
    assert main([*command, "--verify"]) == 0
    assert {path.name for path in out.iterdir()} == {"vae", "text_encoder", "tokenizer"}
    vae, info = AutoencoderKLWan.from_pretrained(out / "vae", output_loading_info=True)
    assert not any(info.values())
    expected = AutoencoderKLWan.from_pretrained(released / "vae")
    settings, wanted = (
        {key: value for key, value in model.config.items() if not key.startswith("_")} for model in (vae, expected)
    )
    assert settings == wanted
    for name, tensor in expected.state_dict().items():
        assert torch.equal(vae.state_dict()[name], tensor), name
    text = UMT5EncoderModel.from_pretrained(out / "text_encoder")
    reference = UMT5EncoderModel.from_pretrained(released / "t5").to(torch.bfloat16)
    tokens = torch.tensor([[3, 4, 5, 1]])
    for name, tensor in reference.state_dict().items():
        assert text.state_dict()[name].dtype == torch.bfloat16 and torch.equal(text.state_dict()[name], tensor), name
    assert torch.equal(text(tokens).last_hidden_state, reference(tokens).last_hidden_state)
    assert main(command) == 1  # it exists
    assert main([*command, "--overwrite"]) == 0
    (out / "notes.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 1 and (out / "notes.txt").exists()


@pytest.mark.parametrize("place", ["", "Wan2.1_VAE.pth", T5])
def test_such_a_file_given_as_a_folder_says_how_to_make_one(released: Path, place: str) -> None:
    given = released / "wan" / place
    for what in ("VAE", "text encoder"):
        with pytest.raises(ConfigError, match=f"convert --from wan {released}/wan --to encoders OUT"):
            require_files(given, what, "config.json")


def test_other_files_are_named_and_nothing_is_left(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wan").mkdir()
    command = ["convert", "--from", "wan", str(tmp_path / "wan"), "--to", "encoders", str(tmp_path / "out")]
    assert main(command) == 1
    assert "holds no encoder of Wan's (Wan2.1_VAE.pth, models_t5_*.pth)" in capsys.readouterr().err
    tensors = torch.load(released / "wan" / "Wan2.1_VAE.pth")
    torch.save({**tensors, "conv2.weight": torch.ones(48, 48, 1, 1, 1)}, tmp_path / "wan" / "Wan2.1_VAE.pth")
    assert main(command) == 1 and "a VAE of 48 latent channels; only Wan2.1's of 16" in capsys.readouterr().err
    tensors.pop("decoder.upsamples.4.residual.2.bias")
    torch.save(tensors, tmp_path / "wan" / "Wan2.1_VAE.pth")
    assert main(command) == 1 and "1 tensors are missing (decoder.up_blocks.1" in capsys.readouterr().err
    assert main([*command, "--dtype", "bfloat16"]) == 2 and "keeps its dtypes" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
