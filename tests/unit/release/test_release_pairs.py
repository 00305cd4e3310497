"""Two experts: one release that diffusers reads, two checkpoints again, and no folder of two taken for one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from helpers.checkpoints import ODD, assert_equal, model_tensors, names, save_checkpoint
from safetensors.torch import load_file, save_file

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.convert import open_weights
from megatron_flashi2v.conversion.initial_weights import open_initial_weights
from megatron_flashi2v.conversion.weights import ReadOptions
from megatron_flashi2v.release.convert import convert
from megatron_flashi2v.sampling.models import find_models

T2V = dataclasses.replace(ODD, conditioning="text_to_video")


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def expert(root: Path, model: ModelConfig, seed: int, **state: object) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(model).items()}
    pieces = [TensorPiece.whole(f"model.{name}", tensor) for name, tensor in tensors.items()]
    save_checkpoint(root, 7, pieces=pieces, model_config=model, state={"iteration": 7, **state})
    return tensors


def pair(root: Path, config: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return expert(root / "high", config, 1), expert(root / "low", config, 2)


def test_a_pair_is_one_release_and_two_checkpoints_again(tmp_path: Path) -> None:
    high, low = pair(tmp_path, T2V)
    source = ("--from", "megatron", tmp_path / "high", "--low-noise", tmp_path / "low")
    release = tmp_path / "release"
    flags = ("--boundary-ratio", 0.875, "--to", "diffusers", release, "--verify", "--report", tmp_path / "r.json")
    assert run(*source, *flags) == 0
    parts = {"transformer", "transformer_2", "image_conditioning", "scheduler", "model_index.json", "README.md"}
    assert names(release) == parts
    assert "two: `transformer/` for timesteps from 1000 to 875" in (release / "README.md").read_text()
    assert set(json.loads((tmp_path / "r.json").read_text())) == {"high_noise_model", "low_noise_model"}
    theirs = WanPipeline.from_pretrained(release, vae=None, text_encoder=None, tokenizer=None)
    assert theirs.config.boundary_ratio == 0.875
    for model, tensors in ((theirs.transformer, high), (theirs.transformer_2, low)):
        assert isinstance(model, WanTransformer3DModel)
        assert torch.equal(model.state_dict()["proj_out.weight"], tensors["head.linear.weight"])
    found = find_models(release / "transformer", low_noise=release / "transformer_2")
    assert found.low_noise is not None and found.low_noise.boundary_ratio == 0.875  # which the pipeline states
    back = ("--from", "diffusers", release / "transformer", "--low-noise", release / "transformer_2")
    assert run(*back, "--to", "megatron", tmp_path / "back") == 0
    assert_equal(model_tensors(tmp_path / "back" / "high_noise_model"), high)
    assert_equal(model_tensors(tmp_path / "back" / "low_noise_model"), low)
    # Wan's layout, which states no boundary; then a release with the boundary that diffusers' folder states
    assert run(*back, "--to", "wan", tmp_path / "wan") == 0
    wan = ("--from", "wan", tmp_path / "wan" / "high_noise_model", "--low-noise", tmp_path / "wan" / "low_noise_model")
    assert run(*wan, "--to", "diffusers", tmp_path / "x") == 2
    assert run(*back, "--to", "diffusers", tmp_path / "again", "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["boundary_ratio"] == 0.875
    # again onto itself; a folder with other things in it is kept
    assert run(*source, *flags) == 1 and run(*source, *flags, "--overwrite") == 0
    assert run(*back, "--to", "wan", tmp_path / "wan", "--overwrite") == 0
    (release / "notes.txt").write_text("mine")
    assert run(*source, *flags, "--overwrite") == 1 and (release / "notes.txt").exists()


def test_experts_with_tensors_of_their_own_keep_both_sets(tmp_path: Path) -> None:
    high, low = pair(tmp_path, ODD)
    source = ("--from", "megatron", tmp_path / "high", "--low-noise", tmp_path / "low")
    assert run(*source, "--boundary-ratio", 0.9, "--to", "diffusers", tmp_path / "out", "--verify") == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["image_conditioning_2"] == index["image_conditioning"] and index["transformer_2"][0] == "diffusers"
    for name, tensors in (("transformer", high), ("transformer_2", low)):
        found = open_weights("auto", tmp_path / "out" / name, ReadOptions())
        assert found.config == ODD
        assert_equal({key: found.read(key) for key in tensors}, tensors)


def test_exported_experts_keep_their_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what they were trained on where that is recorded, and by their folders' names."""
    for name, seed, levels in (("high", 1, {"sigma_min": 0.9}), ("low", 2, {"sigma_max": 0.9})):
        expert(tmp_path / name, T2V, seed, config=levels)
    source = ("--from", "megatron", tmp_path / "high", "--low-noise", tmp_path / "low")
    for form, names_of in (("diffusers", ("transformer", "transformer_2")),
                           ("megatron", ("high_noise_model", "low_noise_model"))):  # fmt: skip
        assert run(*source, "--to", form, tmp_path / form) == 0
        high, low = (tmp_path / form / name for name in names_of)
        found = find_models(high, low_noise=low)
        assert found.low_noise is not None and found.low_noise.boundary_ratio == 0.9
        assert found.low_noise.folder.is_relative_to(low) and found.folder.is_relative_to(high)
        for alone in (high, low):
            with pytest.raises(CheckpointError, match="is one of a pair of experts"):
                find_models(alone)
            shutil.copytree(alone, tmp_path / f"{form}-{alone.name}")  # by itself, the record alone tells
            with pytest.raises(CheckpointError, match=r"was trained on noise levels from .* alone"):
                find_models(tmp_path / f"{form}-{alone.name}")
        with pytest.raises(CheckpointError, match="were they swapped"):
            find_models(low, low_noise=high)
        assert run("--from", form, low, "--low-noise", high, "--to", "wan", tmp_path / "x") == 1
        assert "were they swapped?" in capsys.readouterr().err
    # One expert's own release.
    assert run("--from", "megatron", tmp_path / "low", "--to", "diffusers", tmp_path / "one") == 0
    with pytest.raises(CheckpointError, match="was trained on noise levels from 0 to 0.9 alone"):
        find_models(tmp_path / "one")


def test_each_expert_gets_its_part_of_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    high, low = pair(tmp_path, T2V)
    generator = torch.Generator().manual_seed(4)
    pairs = {
        f"{prefix}.blocks.{block}.attn1.to_out.0.lora_{side}.weight": torch.randn(shape, generator=generator)
        for prefix, block in (("transformer", 0), ("transformer_2", 1))
        for side, shape in (("A", (2, 30)), ("B", (30, 2)))
    }
    save_file(pairs, tmp_path / "both.safetensors")
    save_file({name: value for name, value in pairs.items() if "_2." not in name}, tmp_path / "one.safetensors")
    source = ("--from", "megatron", tmp_path / "high", "--low-noise", tmp_path / "low", "--merge", "--to", "wan")
    assert run(*source, tmp_path / "out", "--adapter", tmp_path / "both.safetensors") == 0
    for name, tensors, prefix, changed in (
        ("high_noise_model", high, "transformer", 0), ("low_noise_model", low, "transformer_2", 1)
    ):  # fmt: skip
        (file,) = (tmp_path / "out" / name).glob("*.safetensors")
        held = load_file(file)
        for block in (0, 1):
            weight = tensors[f"blocks.{block}.self_attention.linear_proj.weight"]
            if block == changed:
                up, down = (pairs[f"{prefix}.blocks.{block}.attn1.to_out.0.lora_{side}.weight"] for side in "BA")
                weight = weight + up @ down
            assert torch.allclose(held[f"blocks.{block}.self_attn.o.weight"], weight, atol=1e-5)
    # The card tells of the merged weights.
    flags = ("diffusers", tmp_path / "release", "--adapter", tmp_path / "both.safetensors", "--boundary-ratio", 0.9)
    assert run(*source[:-1], *flags, "--text-cleaning", "full") == 0 and T2V.text_cleaning == "light"
    assert "cleaning `full`" in (tmp_path / "release" / "README.md").read_text()
    # The second expert by itself, with the pairs of it alone, gets them too.
    save_file({name: value for name, value in pairs.items() if "_2." in name}, tmp_path / "second.safetensors")
    alone = ("--from", "megatron", tmp_path / "low", "--merge", "--to", "wan", tmp_path / "alone")
    assert run(*alone, "--adapter", tmp_path / "second.safetensors") == 0
    assert "second.safetensors is for the expert for low noise alone; took " in capsys.readouterr().err
    (file,) = (tmp_path / "alone").glob("*.safetensors")
    assert all(torch.equal(tensor, held[name]) for name, tensor in load_file(file).items())  # as in the pair
    capsys.readouterr()
    assert run(*source, tmp_path / "x", "--adapter", tmp_path / "one.safetensors") == 1
    assert "one.safetensors is for one model, and --low-noise makes a pair" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_two_that_are_no_pair_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path, T2V)
    expert(tmp_path / "other", ODD, 3)
    expert(tmp_path / "trained", T2V, 3, config={"sigma_min": 0.9, "sigma_max": 1.0})
    source = ("--from", "megatron", tmp_path / "high", "--low-noise")
    for flags, code, words in (
        ((tmp_path / "other", "--boundary-ratio", 0.9), 1, "no pair of experts: they have conditioning text_to_video"),
        ((tmp_path / "trained",), 1, "were they swapped?"),
        ((tmp_path / "low",), 2, "tells where the two experts meet; give --boundary-ratio (0.9 for Wan2.2's I2V-A14B"),
        ((tmp_path / "high", "--boundary-ratio", 0.9), 1, "a pair has two experts"),
        ((tmp_path / "low", "--boundary-ratio", 1.0), 2, "--boundary-ratio is 1.0; it must be above 0 and below 1"),
    ):
        assert run(*source, *flags, "--to", "diffusers", tmp_path / "out") == code
        assert words in capsys.readouterr().err
    wan = ("--from", "diffusers", tmp_path / "p" / "transformer_2", "--low-noise", tmp_path / "p" / "transformer")
    assert run(*source, tmp_path / "low", "--boundary-ratio", 0.9, "--to", "diffusers", tmp_path / "p") == 0
    assert run(*wan, "--to", "wan", tmp_path / "out") == 1  # nothing recorded: the names tell
    assert "is the expert for low noise by its folder's name" in capsys.readouterr().err
    assert run(*source, tmp_path / "low", "--boundary-ratio", 0.9, "--to", "wan", tmp_path / "out") == 2
    assert "the format wan has no place for it" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "p")
    with pytest.raises(ConfigError, match="from Python, call megatron_flashi2v.release.pairs.convert_pair"):
        convert(ConvertConfig.from_flags(
            source=("megatron", str(tmp_path / "high")), low_noise=str(tmp_path / "low"),
            target=("diffusers", str(tmp_path / "out")),
        ))  # fmt: skip
    assert run("--from", "wan", "A", "--boundary-ratio", 0.9, "--to", "wan", "B") == 2
    assert "belongs to two experts; give --low-noise too" in capsys.readouterr().err
    assert run("--from", "wan", "A", "--low-noise", "C", "--to", "encoders", "B") == 2
    assert "--to encoders takes none" in capsys.readouterr().err
    assert names(tmp_path) == {"high", "low", "other", "trained"}


COMFYUI = ModelConfig(num_layers=1, hidden_size=128, ffn_hidden_size=16, num_attention_heads=1, latent_channels=4,
                      freq_dim=256, text_dim=14, text_length=6, conditioning="text_to_video")  # fmt: skip


@pytest.mark.parametrize(("form", "read_as"), [
    ("megatron", "megatron"), ("diffusers", "diffusers"), ("wan", "wan"), ("flashi2v-npu", "flashi2v-npu"),
    ("flashi2v-gpu", "wan"), ("comfyui", "wan"), ("torch-dist", "torch-dist"),  # one has the other's names
])  # fmt: skip
def test_a_pair_given_as_one_model_names_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, read_as: str
) -> None:
    """In every format that is written for pairs, with the flags of the command that it was given to."""
    model = COMFYUI if form == "comfyui" else T2V
    pair(tmp_path, model)
    ratio = ("--boundary-ratio", 0.9) if form == "diffusers" else ()
    source = ("--from", "megatron", tmp_path / "high", "--low-noise", tmp_path / "low")
    assert run(*source, *ratio, "--to", form, tmp_path / "two") == 0
    (tmp_path / "two" / "model_index.json").unlink(missing_ok=True)  # with it, sampling takes both
    names_of = ("transformer", "transformer_2") if form == "diffusers" else ("high_noise_model", "low_noise_model")
    high, low = (tmp_path / "two" / name for name in names_of)
    kept = names(tmp_path)

    def said(*words: object) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{tmp_path / 'two'} holds two models, the experts" in error
        assert names(tmp_path) == kept
        return error

    for given in (form, "auto"):
        both = f"give both, --from {read_as} {high} --low-noise {low}, or one of them: {high} or {low}"
        assert both in said("convert", "--from", given, tmp_path / "two", "--to", "megatron", tmp_path / "x")
        with pytest.raises(CheckpointError) as error:
            open_initial_weights((given, tmp_path / "two"), model)
        one = "give one of them: --load-weights"
        assert f"{one} {read_as}:{high} or --load-weights {read_as}:{low}" in str(error.value)
    frozen = ("--vae", "v", "--text-encoder", "t", "--tokenizer", "t")
    error = said("sample", "--load", tmp_path / "two", *frozen, "--prompt", "a", "--output", tmp_path / "a.mp4")
    if form in ("megatron", "diffusers"):
        assert f"give both, --load {high} --low-noise {low}" in error
    else:
        assert f"flashi2v convert --from {read_as} {high} --low-noise {low} --to megatron OUT, and give --load" in error
