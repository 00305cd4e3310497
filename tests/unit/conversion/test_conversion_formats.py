"""Every format to every other and back, bit for bit; what is told by flags, files and shapes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ODD, assert_equal, checkpoint, model_tensors, names, save_checkpoint, tensors_of
from safetensors.torch import load_file, save_file

from megatron_flashi2v.checkpoint.folders import find_checkpoint, load_model_config
from megatron_flashi2v.checkpoint.key_table import mappings, parameter_shapes
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.convert import FORMATS, convert, open_weights
from megatron_flashi2v.conversion.weights import ReadOptions
from megatron_flashi2v.models.presets import PRESETS

TINY = dataclasses.replace(PRESETS["tiny"], num_layers=1)
EXTERNAL = tuple(name for name in FORMATS if name not in ("megatron", "comfyui"))  # those that hold every paradigm
COLUMNS = {"wan": "wan", "flashi2v-gpu": "wan", "flashi2v-npu": "flashi2v_npu"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def variant(config: ModelConfig, **changes: object) -> ModelConfig:
    return dataclasses.replace(config, **changes)


def external_tensors(config: ModelConfig, column: str) -> dict[str, torch.Tensor]:
    """Random weights under another format's names."""
    ours = tensors_of(config)
    return {
        name: tensor.clone()
        for entry in mappings(config, column)
        for name, tensor in zip(entry.external, entry.to_external(ours[entry.ours]), strict=True)
    }


def to_megatron(source: tuple[str, Path], root: Path, **options: object) -> ModelConfig:
    convert(source, ("megatron", root), **options)
    folder = find_checkpoint(root)
    assert folder is not None
    return load_model_config(folder)


@pytest.mark.parametrize(
    ("config", "bf16"),
    [
        (ODD, True),
        (TINY, False),
        (variant(ODD, conditioning="text_to_video"), True),
        (variant(ODD, conditioning="repeat_concat"), False),
        (variant(ODD, conditioning="inpainting", mask_channels=1), False),
    ],
    ids=["odd", "tiny", "text_to_video", "repeat_concat", "inpainting"],
)
def test_round_trips_through_every_pair(tmp_path: Path, config: ModelConfig, bf16: bool) -> None:
    tensors = checkpoint(tmp_path / "run", config, bf16)
    shard = sum(tensor.nbytes for tensor in tensors.values()) // 2
    exact = tensors_of(config)  # what formats of one dtype get from a bf16 run: its masters
    for first in EXTERNAL:
        convert(("megatron", tmp_path / "run"), (first, tmp_path / first), max_shard_bytes=shard)
        assert to_megatron((first, tmp_path / first), tmp_path / f"{first}-back") == config
        assert_equal(model_tensors(tmp_path / f"{first}-back"), exact if FORMATS[first].one_file else tensors)
        assert len(list((tmp_path / first).rglob("*.safetensors"))) == 1 or not FORMATS[first].one_file
    for first, second in itertools.permutations(EXTERNAL, 2):
        convert((first, tmp_path / first), (second, tmp_path / f"{first}-{second}"))
        weights = open_weights(second, tmp_path / f"{first}-{second}", ReadOptions())
        assert weights.config == config
        expected = exact if FORMATS[first].one_file else tensors
        if FORMATS[second].one_file:
            expected = {name: tensor.float() for name, tensor in expected.items()}
        assert_equal({name: weights.read(name) for name in tensors}, expected)


def test_bits_that_arithmetic_would_lose(tmp_path: Path) -> None:
    strange = torch.tensor([0x7FC01234, -0x3FEDCC, 0x7F800000, -0x800000, -0x80000000, 0x1], dtype=torch.int32)
    tensors = tensors_of(ODD)
    for tensor in tensors.values():
        tensor.view(-1)[: len(strange)] = strange[: tensor.numel()].view(torch.float32)
    pieces = [TensorPiece.whole(f"model.{name}", tensor) for name, tensor in tensors.items()]
    save_checkpoint(tmp_path / "run", 1, pieces=pieces, model_config=ODD, state={})
    before = ("megatron", tmp_path / "run")
    for name in EXTERNAL:
        convert(before, (name, tmp_path / name), verify=True, keep_non_finite=True)
        before = (name, tmp_path / name)
    to_megatron(before, tmp_path / "back", verify=True, keep_non_finite=True)
    for name, tensor in model_tensors(tmp_path / "back").items():
        assert torch.equal(tensor.view(torch.int32), tensors[name].view(torch.int32)), name


@pytest.mark.parametrize("name", COLUMNS)
def test_names_in_the_files_are_the_tables(tmp_path: Path, name: str) -> None:
    tensors = checkpoint(tmp_path / "run")
    convert(("megatron", tmp_path / "run"), (name, tmp_path / "out"))
    assert names(tmp_path / "out") == {WEIGHTS, "config.json", "model_config.json"}
    held = load_file(tmp_path / "out" / WEIGHTS)
    for entry in mappings(ODD, COLUMNS[name]):
        for external, tensor in zip(entry.external, entry.to_external(tensors[entry.ours]), strict=True):
            assert torch.equal(held.pop(external), tensor)
    assert not held
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["dim"], stated["num_heads"], stated["text_len"], stated["eps"]) == (30, 3, 6, 1e-5)
    # Again onto itself; a folder with other things in it is kept.
    convert(("megatron", tmp_path / "run"), (name, tmp_path / "out"), overwrite=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an earlier conversion"):
        convert(("megatron", tmp_path / "run"), (name, tmp_path / "out"), overwrite=True)


def test_what_shapes_cannot_tell_comes_from_flags(tmp_path: Path) -> None:
    config = variant(ODD, text_length=512, text_cleaning="light", norm_eps=1e-6)
    save_file(external_tensors(config, "wan"), tmp_path / "a.safetensors")
    source = ("wan", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors does not say how many heads.* --num-attention-heads"):
        to_megatron(source, tmp_path / "out")
    with pytest.raises(UserError, match="in which order its 3x3x3 phi is computed; give --phi-order"):
        to_megatron(source, tmp_path / "out", num_attention_heads=3)
    flags = {"num_attention_heads": 3, "phi_order": "repeat_then_conv"}
    assert to_megatron(source, tmp_path / "out", **flags) == config
    assert_equal(model_tensors(tmp_path / "out"), tensors_of(config))
    with pytest.raises(UserError, match="num_attention_heads 4 must be"):
        to_megatron(source, tmp_path / "other", num_attention_heads=4, phi_order="repeat_then_conv")
    assert names(tmp_path) == {"a.safetensors", "out"}


def test_what_shapes_cannot_tell_comes_from_a_file_beside(tmp_path: Path) -> None:
    """As Wan's own config.json; with a flag that contradicts it, nothing is done."""
    config = variant(ODD, conditioning="text_to_video", text_cleaning="light")
    folder = tmp_path / "wan"
    folder.mkdir()
    save_file(external_tensors(config, "wan"), folder / WEIGHTS)
    stated = {"num_heads": 3, "text_len": 6, "eps": 1e-5, "dim": 30, "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match="--num-attention-heads is 5, but .*config.json says 3"):
        to_megatron(("wan", folder), tmp_path / "out", num_attention_heads=5)
    found = to_megatron(("wan", folder), tmp_path / "out")
    phi = {name: getattr(config, name) for name in ("phi_kernel_size", "phi_hidden_channels", "phi_order")}
    assert variant(found, **phi) == config
    for name, path in (("megatron", tmp_path / "out"), ("wan", folder)):
        with pytest.raises(UserError, match="num-attention-heads is 15"):
            convert((name, path), ("diffusers", tmp_path / "x"), num_attention_heads=15)
    convert(("wan", folder), ("flashi2v-npu", tmp_path / "npu"))
    with pytest.raises(UserError, match="--phi-order is repeat_then_conv, but .*model_config.json says conv_then"):
        convert(("flashi2v-npu", tmp_path / "npu"), ("wan", tmp_path / "x"), phi_order="repeat_then_conv")


def test_heads_of_128_are_inferred_and_phis_order_is_the_formats(tmp_path: Path) -> None:
    config = variant(
        TINY, hidden_size=256, ffn_hidden_size=64, num_attention_heads=2, phi_kernel_size=(3, 3, 3), text_length=512,
        text_cleaning="light",
    )  # fmt: skip
    orders = {"flashi2v-npu": "repeat_then_conv", "flashi2v-gpu": "conv_then_broadcast"}
    for name, order in orders.items():
        path = tmp_path / f"{name}.pt"
        torch.save(external_tensors(config, COLUMNS[name]), path)
        found = open_weights(name, path, ReadOptions())
        assert found.config == variant(config, phi_order=order)
        assert any("2 heads, of 128" in note for note in found.notes)
        other = open_weights(name, path, ReadOptions(phi_order="repeat_then_conv"))
        assert other.config.phi_order == "repeat_then_conv"


def test_a_format_whose_code_would_run_it_wrong_says_so(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")  # 3x3x3, repeat_then_conv
    run = ("megatron", tmp_path / "run")
    notes = convert(run, ("flashi2v-gpu", tmp_path / "gpu")).report.notes
    assert any("phi as conv_then_broadcast; this model's phi is repeat_then_conv" in note for note in notes)
    assert not convert(run, ("flashi2v-npu", tmp_path / "npu")).report.notes
    checkpoint(tmp_path / "flat", variant(ODD, phi_kernel_size=(1, 3, 3)))
    assert not convert(("megatron", tmp_path / "flat"), ("flashi2v-gpu", tmp_path / "flat-gpu")).report.notes


def test_ema_weights(tmp_path: Path) -> None:
    """A checkpoint that holds both sets, as training with EMA writes it: bf16 weights, fp32 averages."""
    tensors = tensors_of(ODD)
    averages = {name: tensor * 0.5 for name, tensor in tensors.items()}
    pieces = [TensorPiece.whole(f"model.{name}", tensor.bfloat16()) for name, tensor in tensors.items()]
    pieces += [TensorPiece.whole(f"ema.{name}", tensor) for name, tensor in averages.items()]
    save_checkpoint(tmp_path / "run", 7, pieces=pieces, model_config=ODD, state={"iteration": 7})
    run = ("megatron", tmp_path / "run")
    done = convert(run, ("wan", tmp_path / "wan"), weights="ema")
    assert set(done.report.left_out) == {f"model.{name}" for name in tensors}
    to_megatron(("wan", tmp_path / "wan"), tmp_path / "back")
    assert_equal(model_tensors(tmp_path / "back"), averages)
    convert(run, ("megatron", tmp_path / "plain"))
    assert_equal(model_tensors(tmp_path / "plain"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    for source in (("megatron", tmp_path / "back"), ("wan", tmp_path / "wan")):
        with pytest.raises(UserError, match="holds no EMA weights.* --weights ema"):
            convert(source, ("diffusers", tmp_path / "x"), weights="ema")
    convert(run, ("diffusers", tmp_path / "d"))
    with pytest.raises(UserError, match="one set of weights; leave out --weights ema"):
        convert(("diffusers", tmp_path / "d"), ("wan", tmp_path / "x"), weights="ema")


def test_report_tells_what_became_of_every_tensor(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", bf16=True)
    report = convert(
        ("megatron", tmp_path / "run"), ("wan", tmp_path / "wan"), dtype=torch.bfloat16, verify=True
    ).report
    assert list(report.tensors) == list(parameter_shapes(ODD))
    fused = report.tensors["blocks.1.cross_attention.linear_kv.weight"]
    assert fused.source == ("model.blocks.1.cross_attention.linear_kv.weight",)
    assert fused.target == ("blocks.1.cross_attn.k.weight", "blocks.1.cross_attn.v.weight")
    assert fused.renamed and not fused.cast and len(fused.sha256) == 64
    assert report.tensors["head.linear.bias"].cast and report.tensors["head.linear.bias"].stored == ("float32",)
    masters = {name for name in report.left_out if name.startswith("optimizer.master.")}
    assert masters and masters == set(report.left_out)
    text = "\n".join(report.lines())
    for words in ("tensors mapped", "cast (float32 to bfloat16", "left out (optimizer.master.", "equal bit for bit"):
        assert words in text
    json.dumps(report.to_json())


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_box_of_a_tensor_is_what_slicing_it_gives(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path / "run")
    convert(("megatron", tmp_path / "run"), (name, tmp_path / "out"), max_shard_bytes=5000)
    generator = torch.Generator().manual_seed(1)
    for weights in (open_weights(name, tmp_path / "out", ReadOptions()),
                    open_weights("megatron", tmp_path / "run", ReadOptions())):  # fmt: skip
        for tensor, shape in parameter_shapes(ODD).items():
            whole = weights.read(tensor)
            starts = [int(torch.randint(size, (), generator=generator)) for size in shape]
            box = tuple(
                slice(start, start + 1 + int(torch.randint(size - start, (), generator=generator)))
                for start, size in zip(starts, shape, strict=True)
            )
            assert torch.equal(weights.read(tensor, box), whole[box]), (tensor, box)
