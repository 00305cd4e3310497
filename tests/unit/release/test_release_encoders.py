"""Wan's own encoder files as folders: the library's class loads them, and gives what it gave before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer
from torch.nn import functional
from transformers import CLIPVisionModel, UMT5EncoderModel

from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.folders import require_files
from megatron_flashi2v.encoders.image import ImageEncoder

T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


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


def clip_file() -> dict[str, torch.Tensor]:
    """A vision model under Wan's names, with a text model beside; two heads, three layers, 16 patches of 2 x 2."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int, around: float = 0.0) -> torch.Tensor:
        return (around + 0.3 * torch.randn(shape, generator=generator)).half()

    def layer(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": random(rows, columns) / 4, f"{name}.bias": random(rows)}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": random(160, around=1.0), f"{name}.bias": random(160)}

    visual = {"patch_embedding.weight": random(160, 3, 2, 2), "cls_embedding": random(1, 1, 160),
              "pos_embedding": random(1, 17, 160), "head": random(160, 8), **norm("pre_norm"), **norm("post_norm")}
    for block in (f"transformer.{number}" for number in range(3)):
        visual |= {**norm(f"{block}.norm1"), **layer(f"{block}.attn.to_qkv", 480, 160), **norm(f"{block}.norm2"),
                   **layer(f"{block}.attn.proj", 160, 160), **layer(f"{block}.mlp.0", 320, 160),
                   **layer(f"{block}.mlp.2", 160, 320)}  # fmt: skip
    return {f"visual.{name}": value for name, value in visual.items()} | {
        "log_scale": random(1)[0], "textual.token_embedding.weight": random(5, 4),
    }  # fmt: skip


def plain_rows(tensors: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """What Wan's code makes of pictures: all blocks but the last, on norms before each part."""
    held = {name.removeprefix("visual."): value.float() for name, value in tensors.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, held[f"{name}.weight"], held[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], held[f"{name}.weight"], held[f"{name}.bias"], 1e-5)

    patches = functional.conv2d(pixels, held["patch_embedding.weight"], stride=2).flatten(2).transpose(1, 2)
    x = torch.cat([held["cls_embedding"].expand(len(pixels), -1, -1), patches], dim=1) + held["pos_embedding"]
    x = norm("pre_norm", x)
    for block in ("transformer.0", "transformer.1"):
        fused = linear(f"{block}.attn.to_qkv", norm(f"{block}.norm1", x))
        q, k, v = (part.unflatten(2, (2, 80)).transpose(1, 2) for part in fused.split(160, dim=2))
        weights = (q @ k.transpose(2, 3) / 80**0.5).softmax(dim=-1)
        x = x + linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.mlp.2", functional.gelu(linear(f"{block}.mlp.0", norm(f"{block}.norm2", x))))
    return x


def test_the_image_encoder_computes_what_wans_code_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = clip_file()
    (tmp_path / "wan").mkdir()
    torch.save(tensors, tmp_path / "wan" / CLIP)
    command = ["convert", "--from", "wan", str(tmp_path / "wan"), "--to", "encoders", str(tmp_path / "out"), "--verify"]
    assert main(command) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"image_encoder", "image_processor"}
    model, info = CLIPVisionModel.from_pretrained(tmp_path / "out" / "image_encoder", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float16 and model.config.image_size == 8
    qkv = tensors["visual.transformer.2.attn.to_qkv.weight"]
    state = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
    for number, part in enumerate("qkv"):
        found = state[f"encoder.layers.2.self_attn.{part}_proj.weight"]
        assert torch.equal(found, qkv[160 * number : 160 * (number + 1)])
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = plain_rows(tensors, pixels)
    with torch.no_grad():
        rows = model.float()(pixels, output_hidden_states=True).hidden_states[-2]
    assert expected.std() > 0.3
    torch.testing.assert_close(rows, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    # A picture of any shape becomes the encoder's square, whole: its right edge counts.
    encoder = ImageEncoder.load(tmp_path / "out" / "image_encoder", "cpu")
    assert encoder.shape == (17, 160)
    wide = torch.zeros(2, 3, 8, 24)
    wide[1, :, :, 20:] = 1
    first, second = encoder.encode(wide)
    assert (first - second).abs().max() > 0.1
    written = tmp_path / "out" / "image_encoder" / "model.safetensors"
    held = written.read_bytes()
    for change, words in (
        ({"visual.patch_embedding.weight": torch.ones(90, 3, 2, 2)}, "is 90 wide and has 17 positions"),
        ({"visual.transformer.1.mlp.2.bias": torch.ones(3)}, "mlp.fc2.bias"),
        ({"visual.adapter.weight": torch.ones(3)}, "1 tensors are unexpected (vision_model.adapter.weight)"),
        ({"visual.pos_embedding": torch.ones(2, 2)}, "holds no tensor visual.pos_embedding of 3 dimensions"),
    ):
        torch.save({**tensors, **change}, tmp_path / "wan" / CLIP)
        assert main([*command, "--overwrite"]) == 1 and words in capsys.readouterr().err
        assert written.read_bytes() == held


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
    assert "holds no encoder of Wan's (Wan2.1_VAE.pth, models_t5_*.pth, models_clip_*.pth)" in capsys.readouterr().err
    tensors = torch.load(released / "wan" / "Wan2.1_VAE.pth")
    torch.save({**tensors, "conv2.weight": torch.ones(48, 48, 1, 1, 1)}, tmp_path / "wan" / "Wan2.1_VAE.pth")
    assert main(command) == 1 and "a VAE of 48 latent channels; only Wan2.1's of 16" in capsys.readouterr().err
    tensors.pop("decoder.upsamples.4.residual.2.bias")
    torch.save(tensors, tmp_path / "wan" / "Wan2.1_VAE.pth")
    assert main(command) == 1 and "1 tensors are missing (decoder.up_blocks.1" in capsys.readouterr().err
    assert main([*command, "--dtype", "bfloat16"]) == 2 and "keeps its dtypes" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
