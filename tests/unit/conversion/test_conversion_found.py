"""Files as they are found in the wild, one test for each row of the table in ``conversion/README.md``.

What is read gives the values that were written; what is not is named for what it is, with the next step.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers.checkpoints import ODD, assert_equal, checkpoint, model_tensors, names, tensors_of
from helpers.reference_weights import random_weights
from safetensors.torch import save_file

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.convert import FORMATS, convert, open_weights
from megatron_flashi2v.conversion.initial_weights import open_initial_weights
from megatron_flashi2v.conversion.weights import ReadOptions, Weights
from megatron_flashi2v.release.forward_check import compare_forward

STEM = "diffusion_pytorch_model"
T2V = dataclasses.replace(ODD, conditioning="text_to_video")
Q = "blocks.1.self_attn.q.weight"
HEADS = ReadOptions(num_attention_heads=3)


def written(config: ModelConfig = T2V, column: str = "wan") -> dict[str, torch.Tensor]:
    """Random weights under another format's names."""
    ours = tensors_of(config)
    return {
        name: tensor.clone()
        for entry in mappings(config, column)
        for name, tensor in zip(entry.external, entry.to_external(ours[entry.ours]), strict=True)
    }


WAN = written()
NAMES = sorted(WAN)


def open_auto(path: Path, options: ReadOptions = HEADS) -> Weights:
    return open_weights("auto", path, options)


def assert_holds(weights: Weights, expected: Mapping[str, torch.Tensor]) -> None:
    for entry in mappings(weights.config, "wan"):
        parts = entry.to_external(weights.read(entry.ours))
        for name, part in zip(entry.external, parts, strict=True):
            assert torch.equal(part, expected[name]), name


def refusal(path: Path, form: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        open_weights(form, path, HEADS)
    return str(caught.value)


def shards(folder: Path, pattern: str, parts: int = 3) -> list[Path]:
    """The tensors in so many files, of names like ``model-{number:05d}-of-00003.bin``."""
    paths = [folder / pattern.format(number=number + 1) for number in range(parts)]
    for number, path in enumerate(paths):
        part = {name: WAN[name] for name in NAMES[number::parts]}
        (save_file if path.suffix == ".safetensors" else torch.save)(part, path)
    return paths


def index(folder: Path, name: str, paths: list[Path]) -> None:
    weight_map = {key: paths[number % len(paths)].name for number, key in enumerate(NAMES)}
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


# --- files that are read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "index_name", "note"),
    [
        (STEM + "-{number:05d}-of-00003.safetensors", f"{STEM}.safetensors.index.json", ""),
        (STEM + "-{number:05d}-of-00003.bin", f"{STEM}.bin.index.json", ""),
        (STEM + ".fp16-{number:05d}-of-00003.safetensors", f"{STEM}.safetensors.index.fp16.json", ""),
        (STEM + "-{number:05d}-of-00003.fp16.safetensors", f"{STEM}.fp16.safetensors.index.json", ""),
        (STEM + "-{number:05d}-of-00003.safetensors", None, "read 3 shards without their index"),
        ("model-{number:05d}-of-00003.bin", None, "read 3 shards without their index"),
    ],
)
def test_shards(tmp_path: Path, pattern: str, index_name: str | None, note: str) -> None:
    paths = shards(tmp_path, pattern)
    if index_name is not None:
        index(tmp_path, index_name, paths)
    weights = open_auto(tmp_path)
    assert_holds(weights, WAN)
    assert [line for line in weights.notes if "shards" in line] == ([note] if note else [])
    paths[1].unlink()
    assert "there is no such file" in refusal(tmp_path, "wan") if index_name else "not all of them" in refusal(tmp_path)


def test_a_shard_of_another_number_is_not_taken_for_one(tmp_path: Path) -> None:
    shards(tmp_path, STEM + "-{number:05d}-of-00003.safetensors")
    shutil.copyfile(tmp_path / f"{STEM}-00001-of-00003.safetensors", tmp_path / f"{STEM}-00001-of-00004.safetensors")
    assert "no index of its shards, and not all of them" in refusal(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path, STEM + "-{number:05d}-of-00003.safetensors")
    save_file(WAN, tmp_path / f"{STEM}-00003-of-00003.safetensors")
    assert f"tensor {NAMES[0]} is in {STEM}-00001-of-00003.safetensors and" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".fp16.bin", ".fp16.safetensors", ".bf16.safetensors", ".pt", ".ckpt"])
def test_one_file_of_any_kind(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"{STEM}{suffix}"
    (save_file if path.suffix == ".safetensors" else torch.save)(WAN, path)
    assert_holds(open_auto(tmp_path), WAN)
    assert_holds(open_auto(path), WAN)


def test_full_precision_is_preferred_to_a_variant_and_safetensors_to_a_pickle(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in WAN.items()}
    save_file(half, tmp_path / f"{STEM}.fp16.safetensors")
    torch.save({name: tensor + 1 for name, tensor in WAN.items()}, tmp_path / f"{STEM}.bin")
    assert_holds(open_auto(tmp_path), half)
    save_file(WAN, tmp_path / f"{STEM}.safetensors")
    weights = open_auto(tmp_path)
    assert_holds(weights, WAN)
    left = f"{STEM}.bin, {STEM}.fp16.safetensors"
    assert f"took {STEM}.safetensors and left {left}" in weights.notes
    save_file(WAN, tmp_path / "other.safetensors")
    assert "name the file to read" in refusal(tmp_path, "wan")


def test_the_encoders_files_beside_a_transformer(tmp_path: Path) -> None:
    """A folder of Wan2.1, whose transformer is a .pth like the encoders."""
    encoders = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit.pth")
    for name in encoders:
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    text = refusal(tmp_path, "wan")
    assert "files of Wan's encoders alone" in text and all(name in text for name in encoders)
    torch.save(WAN, tmp_path / f"{STEM}.pth")
    assert_holds(open_auto(tmp_path), WAN)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "predictor."])
def test_a_prefix_before_every_name(tmp_path: Path, prefix: str) -> None:
    save_file({prefix + name: tensor for name, tensor in WAN.items()}, tmp_path / "a.safetensors")
    assert_holds(open_auto(tmp_path / "a.safetensors"), WAN)


def in_eight_bits(form: torch.dtype, scale: Callable[[torch.Tensor], torch.Tensor] | None, key: str) -> tuple[
    dict[str, torch.Tensor], dict[str, torch.Tensor]
]:
    """A file's tensors, its matrices in eight bits; and the values that they count, in fp64."""
    held: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for name, tensor in WAN.items():
        if tensor.dim() != 2 or not name.startswith("blocks."):
            held[name] = counts[name] = tensor
            continue
        factor = torch.ones(()) if scale is None else scale(tensor)
        held[name] = (tensor / factor.reshape(-1, 1)).to(form)
        counts[name] = held[name].double() * factor.double().reshape(-1, 1)
        if scale is not None:
            held[name.removesuffix("weight") + key] = factor
            held[name.removesuffix("weight") + "scale_input"] = torch.ones(())
    return held, counts


@pytest.mark.parametrize("form", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_without_scales_count_as_they_are(tmp_path: Path, form: torch.dtype) -> None:
    held, counts = in_eight_bits(form, None, "")
    save_file(held, tmp_path / "a.safetensors")
    weights = open_auto(tmp_path / "a.safetensors")
    assert_holds(weights, counts)
    name = "blocks.1.mlp.linear_fc1.weight"
    assert (weights.dtype(name), weights.stored_dtypes(name)) == (torch.bfloat16, (form,))


@pytest.mark.parametrize("key", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_eight_bits_are_read_by_their_scales(tmp_path: Path, key: str, rows: bool) -> None:
    def scale(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.abs().amax(dim=1, keepdim=True) / 300 if rows else tensor.abs().max() / 300

    held, counts = in_eight_bits(torch.float8_e4m3fn, scale, key)
    held["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file({f"model.diffusion_model.{name}": tensor.clone() for name, tensor in held.items()},
              tmp_path / "a.safetensors")  # fmt: skip
    weights = open_auto(tmp_path / "a.safetensors")
    for entry in mappings(weights.config, "wan"):
        whole = weights.read(entry.ours)
        for name, part in zip(entry.external, entry.to_external(whole), strict=True):
            assert part.dtype == torch.float32
            assert torch.allclose(part.double(), counts[name].double(), rtol=2**-23, atol=0)
        if whole.dim() == 2:  # a box by itself, as a rank reads it
            assert torch.equal(weights.read(entry.ours, (slice(3, 7), slice(2, 5))), whole[3:7, 2:5])
    assert any(name.endswith(key) for name in weights.left_out)
    del held[f"blocks.1.ffn.0.{key}"]
    save_file(held, tmp_path / "b.safetensors")
    assert "tensor blocks.1.ffn.0.weight is in eight bits and has no scale" in refusal(tmp_path / "b.safetensors")
    held[f"blocks.1.ffn.0.{key}"] = torch.ones(2, 2)
    save_file(held, tmp_path / "b.safetensors")
    assert "the scale of tensor blocks.1.ffn.0.weight has shape (2, 2)" in refusal(tmp_path / "b.safetensors")


# --- weights that are something else ------------------------------------------------------------------------------


def lora(prefix: str, down: str, up: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{down}": torch.ones(2, 30), f"{prefix}{up}": torch.ones(30, 2)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lora("transformer.blocks.0.attn1.to_q.", "lora_A.weight", "lora_B.weight"), "is an adapter (LoRA); give its"),
        (lora("diffusion_model.blocks.0.self_attn.q.", "lora_down.weight", "lora_up.weight"), "an adapter (LoRA)"),
        (lora("lora_unet_blocks_0_self_attn_q.", "lora_down.weight", "lora_up.weight"), "an adapter (LoRA)"),
        (lora("blocks.0.self_attn.q.", "lora_A.default.weight", "lora_B.default.weight"), "an adapter (LoRA)"),
        ({"decoder.conv1.weight": torch.ones(1), "decoder.middle.0.residual.2.weight": torch.ones(1)}, "is a VAE;"),
        ({"decoder.conv_in.weight": torch.ones(1)}, "makes the folder that --vae takes"),
        ({"blocks.0.attn.q.weight": torch.ones(1)}, "makes the folder that --text-encoder takes"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(1)}, "is a T5 text encoder"),
        ({"visual.transformer.0.attn.to_qkv.weight": torch.ones(1)}, "is a CLIP image encoder"),
        ({"vision_model.embeddings.patch_embedding.weight": torch.ones(1)}, "is a CLIP image encoder"),
        ({**WAN, "vace_patch_embedding.weight": torch.ones(1)}, "is Wan's VACE: it has blocks for a control video"),
        ({**WAN, "ref_conv.weight": torch.ones(1)}, "is a control model: it has a branch"),
        ({**WAN, "control_adapter.conv.weight": torch.ones(1)}, "is a control model: it has a branch"),
        *(({**WAN, name: torch.ones(1)}, "is Wan's model for speech or animation: it has a branch for sound or a face")
          for name in ("audio_injector.injector.0.q.weight", "casual_audio_encoder.weights",
                       "face_adapter.fuser_blocks.0.linear1_q.weight", "pose_patch_embedding.weight")),
        ({**WAN, "img_emb.proj.1.weight": torch.ones(1), "img_emb.emb_pos": torch.ones(1)}, "first and last frames"),
        ({**WAN, Q: torch.ones(30, 30, dtype=torch.int8)}, f"tensor {Q} is of torch.int8: quantised weights"),
        ({**WAN, f"{Q}.absmax": torch.ones(3)}, "is weights quantised to 4 bits"),
        ({"lm_head.weight": torch.ones(3)}, "holds 1 tensors of no format that is known here"),
    ],
)  # fmt: skip
def test_weights_of_another_kind_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    assert words in refusal(tmp_path / "a.safetensors")
    if "no format" not in words:
        assert words in refusal(tmp_path / "a.safetensors", "wan")


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "wan-q4.gguf").write_bytes(b"GGUF" + bytes(20))
    assert "is a GGUF file, whose quantised weights cannot be read; give the bf16" in refusal(tmp_path / "wan-q4.gguf")
    assert "holds GGUF files alone" in refusal(tmp_path)


@pytest.mark.parametrize("extra", [8, 9, 12])
def test_control_models_are_no_image_to_video_models(tmp_path: Path, extra: int) -> None:
    """48 and 52 input channels for 16 latents, here with 4: 12 and more. Only a mask of 4 channels is Wan's I2V's."""
    tensors = {**WAN, "patch_embedding.weight": torch.ones(30, 4 + extra, 1, 2, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    if extra == 8:
        assert open_auto(tmp_path / "a.safetensors").config.conditioning == "wan_i2v"
        return
    assert "is a control model" not in (text := refusal(tmp_path / "a.safetensors"))
    assert f"takes {4 + extra} channels, the latents have 4: a control model, such as Wan2.1-Fun-Control" in text
    small_transformer(tmp_path / "b", in_channels=4 + extra)
    text = refusal(tmp_path / "b")
    assert f"{tmp_path}/b/config.json: in_channels is {4 + extra} and out_channels 4: a control model" in text


# --- folders ------------------------------------------------------------------------------------------------------


def small_transformer(folder: Path, **changes: object) -> WanTransformer3DModel:
    settings = {"num_attention_heads": 3, "attention_head_dim": 10, "in_channels": 4, "out_channels": 4, "text_dim": 14,
                "freq_dim": 16, "ffn_dim": 22, "num_layers": 1}  # fmt: skip
    model = WanTransformer3DModel(**{**settings, **changes})
    model.save_pretrained(folder)
    return model


def assert_is(weights: Weights, model: WanTransformer3DModel) -> None:
    state = model.state_dict()
    for entry in mappings(weights.config, "diffusers"):
        assert torch.equal(weights.read(entry.ours), entry.to_ours([state[name] for name in entry.external]))


def test_two_experts_of_diffusers_are_not_taken_for_one(tmp_path: Path) -> None:
    high = small_transformer(tmp_path / "wan22" / "transformer")
    low = small_transformer(tmp_path / "wan22" / "transformer_2")
    (tmp_path / "wan22" / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.875}))
    for form in ("diffusers", "auto"):
        text = refusal(tmp_path / "wan22", form)
        assert "holds two models" in text and text.endswith(f"{tmp_path}/wan22/transformer_2")
    for name, model, side in (("transformer", high, "at least"), ("transformer_2", low, "below")):
        weights = open_auto(tmp_path / "wan22" / name, ReadOptions())
        assert_is(weights, model)
        assert f"timesteps {side}" in (note := weights.notes[0]).replace("of at", "at") and "is 0.875" in note


def test_two_experts_of_wan_are_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        (tmp_path / name).mkdir()
        save_file(WAN, tmp_path / name / f"{STEM}.safetensors")
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    for form in ("wan", "auto"):
        text = refusal(tmp_path, form)
        assert "holds two models, the experts" in text and "VAE" not in text
        assert text.endswith(f"{tmp_path}/high_noise_model or {tmp_path}/low_noise_model")
    for name, other, side in (("high_noise_model", "low_noise_model", "of at least"),
                              ("low_noise_model", "high_noise_model", "below")):  # fmt: skip
        for path in (tmp_path / name, tmp_path / name / f"{STEM}.safetensors"):
            assert_holds(weights := open_auto(path), WAN)
            assert f"one of two experts, for timesteps {side} boundary_ratio x 1000 (0.9 in" in weights.notes[0]
            assert weights.notes[0].endswith(f"{other} is another model")
    shutil.rmtree(tmp_path / "high_noise_model")  # one alone, beside the encoders' files
    assert refusal(tmp_path).endswith("and no transformer; did you mean its subfolder low_noise_model?")


def test_wan_i2v_of_diffusers_is_read(tmp_path: Path) -> None:
    settings = {"image_dim": 6, "added_kv_proj_dim": 30, "in_channels": 12}
    model = small_transformer(tmp_path / "transformer", **settings)
    weights = open_auto(tmp_path, ReadOptions())
    config = weights.config
    assert (config.conditioning, config.mask_channels, config.image_dim, config.image_rows) == ("wan_i2v", 4, 6, 257)
    assert_is(weights, model)
    small_transformer(tmp_path / "flf" / "transformer", **settings, pos_embed_seq_len=514)
    assert "(pos_embed_seq_len is 514) is Wan2.1's model of first and last frames" in refusal(tmp_path / "flf")
    path = tmp_path / "transformer" / "config.json"
    stored = json.loads(path.read_text())
    for change in ({"added_kv_proj_dim": None}, {"added_kv_proj_dim": 20}, {"image_dim": None}):
        path.write_text(json.dumps({**stored, **change}))
        assert "both must be there, the latter as the width 30, or neither" in refusal(tmp_path)
    path.write_text(json.dumps({**stored, "in_channels": 4}))
    assert "without the input channels of Wan's image-to-video models" in refusal(tmp_path)


def test_wan_i2v_of_wan_without_the_branch_is_read(tmp_path: Path) -> None:
    """Wan2.2's, by its shapes alone."""
    config = dataclasses.replace(ODD, conditioning="wan_i2v", image_dim=0)
    tensors = written(config)
    assert not [name for name in tensors if "img" in name]
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    weights = open_auto(tmp_path)
    found = weights.config
    assert (found.conditioning, found.image_dim, found.mask_channels) == ("wan_i2v", 0, 4)
    assert_holds(weights, tensors)


def test_wan_i2v_of_wan_is_read(tmp_path: Path) -> None:
    """With Wan's config.json alone, without, and as one of first and last frames."""
    config = dataclasses.replace(ODD, conditioning="wan_i2v", image_dim=6)
    tensors = random_weights(config, "wan", torch.Generator().manual_seed(0))
    assert tensors["img_emb.proj.1.weight"].shape == (6, 6) and tensors["img_emb.proj.3.weight"].shape == (30, 6)
    assert "blocks.1.cross_attn.norm_k_img.weight" in tensors and "blocks.1.cross_attn.v_img.bias" in tensors
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    for _ in range(2):
        weights = open_auto(tmp_path)
        assert (weights.config.conditioning, weights.config.image_dim) == ("wan_i2v", 6)
        assert_holds(weights, tensors)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "i2v", "in_dim": 12, "num_heads": 3}))
    save_file({**tensors, "img_emb.emb_pos": torch.ones(1, 514, 6)}, tmp_path / f"{STEM}.safetensors")
    assert "(tensor img_emb.emb_pos) is Wan2.1's model of first and last frames" in refusal(tmp_path)
    del tensors["blocks.1.cross_attn.k_img.weight"]
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    assert "1 tensors are missing (blocks.1.cross_attn.k_img.weight)" in refusal(tmp_path)


@pytest.mark.parametrize("image_dim", [6, 0])
def test_wan_i2v_goes_round_through_every_format(tmp_path: Path, image_dim: int) -> None:
    """Of one head of 128, as ComfyUI takes for granted; last from ComfyUI's to another one and back."""
    config = dataclasses.replace(
        ODD, conditioning="wan_i2v", image_dim=image_dim, image_rows=5, hidden_size=128, num_attention_heads=1,
        freq_dim=256, norm_eps=1e-6,
    )
    tensors = checkpoint(tmp_path / "run", config)
    source = ("megatron", tmp_path / "run")
    for form in sorted(FORMATS.keys() - {"megatron"}):
        convert(source, (form, tmp_path / form))
        convert((form, tmp_path / form), ("megatron", tmp_path / f"{form}-back"))
        assert_equal(model_tensors(tmp_path / f"{form}-back"), tensors)
        assert open_weights(form, tmp_path / form, ReadOptions()).config == config
    model, info = WanTransformer3DModel.from_pretrained(
        tmp_path / "diffusers" / "transformer", output_loading_info=True
    )
    assert not any(info.values()), info
    assert (model.config.image_dim, model.config.added_kv_proj_dim) == ((6, 128) if image_dim else (None, None))
    for first, second in (("comfyui", "torch-dist"), ("torch-dist", "diffusers"), ("diffusers", "megatron")):
        convert((first, tmp_path / first), (second, tmp_path / second), overwrite=second != "megatron")
    assert_equal(model_tensors(tmp_path / "megatron"), tensors)
    stored = json.loads((tmp_path / "wan" / "config.json").read_text())
    assert (stored["model_type"], stored["in_dim"]) == ("i2v", 12)


def test_other_paradigms_start_from_wan_i2v_without_the_branch(tmp_path: Path) -> None:
    config = dataclasses.replace(ODD, conditioning="wan_i2v", image_dim=6, image_rows=5)
    tensors = checkpoint(tmp_path / "run", config)
    light = dataclasses.replace(config, conditioning="inpainting")
    initial = open_initial_weights(("megatron", tmp_path / "run"), light)
    branch = {name for name in tensors if "image" in name}
    assert set(initial.unexpected) == branch and len(branch) == 8 + 2 * 3 and not initial.missing
    assert "14 are unexpected and left out (image_embedding.norm_in.weight" in initial.summary
    checkpoint(tmp_path / "light", light)
    back = open_initial_weights(("megatron", tmp_path / "light"), config)
    assert set(back.missing) == branch and not back.unexpected
    with pytest.raises(UserError, match="mask_channels is 4 in the checkpoint, 2 was asked for"):
        open_initial_weights(("megatron", tmp_path / "run"), dataclasses.replace(light, mask_channels=2))
    with pytest.raises(UserError, match="conditioning is wan_i2v in the checkpoint, text_to_video was asked for"):
        open_initial_weights(("megatron", tmp_path / "run"), dataclasses.replace(config, conditioning="flashi2v"))


def test_ti2v_says_what_is_not_read(tmp_path: Path) -> None:
    model = small_transformer(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"expand_timesteps": True}))
    weights = open_auto(tmp_path, ReadOptions())
    assert_is(weights, model)
    assert "a clean first latent frame" in weights.notes[0]


@pytest.mark.parametrize(
    ("variant", "safe"), [(None, False), ("fp16", True), ("fp16", False)], ids=["bin", "fp16", "fp16.bin"]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_diffusers_folder_as_diffusers_saves_it(
    tmp_path: Path, variant: str | None, safe: bool, sharded: bool
) -> None:
    model = small_transformer(tmp_path / "first")
    folder = tmp_path / "wan" / "transformer"
    model.save_pretrained(
        folder, variant=variant, safe_serialization=safe, max_shard_size="10KB" if sharded else "1GB"
    )
    assert (len(list(folder.iterdir())) > 3) == sharded
    assert_is(open_auto(tmp_path / "wan", ReadOptions()), model)


# --- formats that were told wrongly -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same FlashI2V model in every format."""
    root = tmp_path_factory.mktemp("exports")
    checkpoint(root / "megatron")
    for name in ("diffusers", "wan", "flashi2v-npu", "flashi2v-gpu"):
        convert(("megatron", root / "megatron"), (name, root / name))
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("held", ["megatron", "diffusers", "flashi2v-npu", "flashi2v-gpu"])
def test_a_format_is_recognised(exports: dict[str, Path], tmp_path: Path, held: str) -> None:
    convert(("auto", exports[held]), ("megatron", tmp_path / "back"))
    assert model_tensors(tmp_path / "back").keys() == tensors_of(ODD).keys()
    for other in ("megatron", "diffusers", "wan", "flashi2v-npu", "flashi2v-gpu"):
        if other != held and {other, held} != {"wan", "flashi2v-gpu"}:
            assert f"is in the format {held}, not {other}; give {held} in its place, or auto" in refusal(
                exports[held], other
            )


def test_a_checkpoint_that_is_none_advises_a_format_that_reads_it(exports: dict[str, Path], tmp_path: Path) -> None:
    save_file(WAN, tmp_path / f"{STEM}.safetensors")
    for path in (exports["wan"], exports["diffusers"], tmp_path, tmp_path / f"{STEM}.safetensors"):
        with pytest.raises(UserError, match="convert the model first: flashi2v convert --from auto PATH"):
            find_checkpoint(path)


def test_command_line_takes_auto(exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ["--to", "megatron", str(tmp_path / "out")]
    assert main(["convert", "--from", "wan", str(exports["diffusers"]), *target]) == 1
    assert "is in the format diffusers, not wan" in capsys.readouterr().err and not names(tmp_path)
    assert main(["convert", "--from", "auto", str(exports["diffusers"]), *target]) == 0
    release = tmp_path / "release"
    assert main(["convert", "--from", "auto", str(tmp_path / "out"), "--to", "diffusers", str(release)]) == 0
    assert "exported from the format megatron" in " ".join((release / "README.md").read_text().split())


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "value"), [("wan", float("nan")), ("diffusers", float("inf")), ("megatron", float("-inf"))]
)
def test_a_value_that_is_no_number_is_named(tmp_path: Path, form: str, value: float) -> None:
    save_file({**WAN, Q: torch.full((30, 30), value)}, tmp_path / "a.safetensors")
    source = ("wan", tmp_path / "a.safetensors")
    if form != "wan":
        convert(source, (form, tmp_path / form), keep_non_finite=True, num_attention_heads=3)
        source = (form, tmp_path / form)
    target = ("flashi2v-npu", tmp_path / "out")
    with pytest.raises(UserError, match=r"tensor \S*blocks.1.\S+ holds \d+ of \d+ values that are NaN"):
        convert(source, target, num_attention_heads=3)
    assert not target[1].exists()
    forward = partial(compare_forward, target_format=target[0])  # would be nan, which shows nothing
    done = convert(source, target, keep_non_finite=True, verify=True, num_attention_heads=3, check=forward)
    assert any(line.startswith("no forward pass") for line in done.report.lines())
    (name,), (count,) = done.report.non_finite.keys(), done.report.non_finite.values()
    assert count == 900 and f"900 values that are NaN or infinite kept ({name})" in done.report.lines()
