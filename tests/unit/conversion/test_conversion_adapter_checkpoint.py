"""Checkpoints of an adapter: merged into their base, or written in the forms of others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ODD, checkpoint, names, save_checkpoint, tensors_of
from safetensors.torch import load_file

from megatron_flashi2v.checkpoint.adapter_record import ADAPTER_NAME, AdapterRecord
from megatron_flashi2v.checkpoint.adapter_table import adapter_mappings, adapter_shapes
from megatron_flashi2v.checkpoint.index import Index, StoredPiece, StoredTensor, write_index
from megatron_flashi2v.checkpoint.key_table import mappings, parameter_shapes
from megatron_flashi2v.checkpoint.saving import finish_folder, write_tracker
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.checkpoint.tensor_file import TensorSpec, write_tensor_file
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.conversion.adapters.reading import open_adapter
from megatron_flashi2v.conversion.base_fingerprint import base_fingerprint
from megatron_flashi2v.conversion.convert import open_weights
from megatron_flashi2v.conversion.weights import ReadOptions

ADAPTER = AdapterConfig(rank=2, alpha=3.0, targets=("self_attn.q", "self_attn.v", "cross_attn.o", "ffn.0"))
BASE = dataclasses.replace(ODD, conditioning="text_to_video")
OWN = tuple(name for name in parameter_shapes(ODD) if name not in parameter_shapes(BASE))


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def save_adapter(
    root: Path, base: Path, trained: tuple[str, ...], form: str = "wan", of_base: str = "model"
) -> dict[str, torch.Tensor]:
    """A checkpoint of a bf16 run on a base; its exact tensors by our names, whose averages are their halves."""
    weights = open_weights(form, base, ReadOptions(assume=ODD, weights=of_base))
    record = AdapterRecord(
        adapter=ADAPTER, trained=trained, base=f"{form}:{base}", base_weights=of_base,
        base_fingerprint=base_fingerprint(weights),
    )
    generator = torch.Generator().manual_seed(9)
    shapes = {**adapter_shapes(ODD, ADAPTER), **{name: parameter_shapes(ODD)[name] for name in trained}}
    exact = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    held: dict[str, torch.Tensor] = {}
    for name, tensor in exact.items():
        if tensor.dim() > 1:
            held |= {f"model.{name}": tensor.bfloat16(), f"optimizer.master.{name}": tensor}
        else:
            held[f"model.{name}"] = tensor
        held[f"ema.{name}"] = tensor / 2
    folder = root / "iter_0000003"
    folder.mkdir(parents=True)
    specs = [TensorSpec(name=key, dtype=tensor.dtype, shape=tuple(tensor.shape)) for key, tensor in held.items()]
    file = write_tensor_file(folder / "a.safetensors", specs, held.values())
    tensors = {
        spec.name: StoredTensor(dtype=spec.dtype, shape=spec.shape, pieces=(
            StoredPiece(file="a.safetensors", name=spec.name, offset=(0,) * len(spec.shape), shape=spec.shape,
                        flat_range=None),
        )) for spec in specs
    }  # fmt: skip
    write_index(folder, Index(tensors=tensors, files={"a.safetensors": file}))
    (folder / ADAPTER_NAME).write_text(json.dumps(record.to_json()))
    finish_folder(folder, ODD, {"iteration": 3})
    write_tracker(root, 3)
    return exact


@pytest.fixture
def base(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "t2v", BASE)
    assert run("--from", "megatron", tmp_path / "t2v", "--to", "wan", tmp_path / "base") == 0
    return tmp_path / "base"


def test_a_checkpoint_is_merged_with_the_tensors_that_it_trained_whole(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A FlashI2V that an adapter made of a text-to-video model: phi and the rest were trained whole."""
    exact = save_adapter(tmp_path / "run", base, OWN)
    flags = ("--adapter", tmp_path / "run", "--merge", "--verify")
    assert run("--from", "wan", base, *flags, "--to", "megatron", tmp_path / "full") == 0
    merged = open_weights("megatron", tmp_path / "full", ReadOptions())
    assert merged.config == ODD
    ours = tensors_of(BASE)
    pairs = {entry.external[0]: exact[entry.ours].double() for entry in adapter_mappings(ODD, ADAPTER, "wan")}
    changed = 0
    for entry in mappings(ODD, "wan"):
        if entry.ours in OWN:
            found = merged.read(entry.ours)
            assert torch.equal(found, exact[entry.ours].bfloat16() if found.dim() > 1 else exact[entry.ours])
            continue
        for name, part, found in zip(
            entry.external, entry.to_external(ours[entry.ours]), entry.to_external(merged.read(entry.ours)), strict=True
        ):
            layer = name.removesuffix(".weight")
            down, up = (pairs.get(f"{layer}.lora_{side}.weight") for side in "AB")
            if down is None or up is None:
                assert torch.equal(found, part), name
            else:
                changed += 1
                assert torch.allclose(found.double(), part + 1.5 * up @ down, atol=1e-5, rtol=0), name
    assert changed == 2 * len(ADAPTER.targets)
    # the base in another format and with masters to read; the sum in one more
    assert run("--from", "diffusers", base, *flags, "--to", "wan", tmp_path / "x") == 1
    assert f"{base} is in the format wan, not diffusers" in capsys.readouterr().err
    assert run("--from", "megatron", tmp_path / "t2v", *flags, "--to", "flashi2v-gpu", tmp_path / "gpu") == 0
    again = open_weights("flashi2v-gpu", tmp_path / "gpu", ReadOptions())
    assert all(torch.equal(again.read(name), merged.read(name)) for name in parameter_shapes(ODD) if name not in OWN)


def test_averages_of_an_adapter_and_of_its_base(tmp_path: Path) -> None:
    """--weights is the adapter's; the base's set is the recorded one, also where an export holds nothing else."""
    tensors = tensors_of(ODD)
    pieces = [TensorPiece.whole(f"{kind}.{name}", factor * tensor)
              for kind, factor in (("model", 1), ("ema", 3)) for name, tensor in tensors.items()]  # fmt: skip
    base, alone, out = (tmp_path / name for name in ("base", "alone", "out"))
    save_checkpoint(base, 1, pieces=pieces, model_config=ODD, state={})
    exact = save_adapter(tmp_path / "run", base, OWN, "megatron", "ema")
    assert run("--from", "megatron", base, "--weights", "ema", "--to", "flashi2v-gpu", alone) == 0
    fused, qkv = "blocks.1.self_attention.linear_qkv", next(
        entry for entry in mappings(ODD, "wan") if "blocks.1.self_attn.v.weight" in entry.external
    )
    for source, weights, factor in (
        (("megatron", base), "model", 1.0), (("megatron", base), "ema", 0.5), (("flashi2v-gpu", alone), "ema", 0.5),
    ):  # fmt: skip
        flags = ("--weights", weights, "--adapter", tmp_path / "run", "--merge", "--overwrite")
        assert run("--from", *source, *flags, "--to", "megatron", out) == 0
        merged = open_weights("megatron", out, ReadOptions())
        up, down = (factor * exact[f"{fused}.adapter.v.lora_{side}.weight"] for side in "BA")
        before, after = (qkv.to_external(of)[2] for of in (3 * tensors[qkv.ours], merged.read(qkv.ours)))
        torch.testing.assert_close(after, before + 1.5 * up @ down, atol=1e-5, rtol=0)
        for name in OWN:  # averages are fp32; the weights of a bf16 run are not
            expected = factor * exact[name] if weights == "ema" or exact[name].dim() < 2 else exact[name].bfloat16()
            found = merged.read(name)
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_an_adapter_by_itself_goes_to_other_forms(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = save_adapter(tmp_path / "run", base, ())
    for form in ("diffusers-lora", "comfyui-lora"):
        assert run("--from", "auto", tmp_path / "run", "--to", form, tmp_path / form, "--verify") == 0
        found = open_adapter(tmp_path / form).pairs
        expected = {entry.external[0]: exact[entry.ours] for entry in adapter_mappings(ODD, ADAPTER, "wan")}
        assert 2 * len(found) == len(expected) and {pair.alpha for pair in found.values()} == {3.0}
        for layer, pair in found.items():
            for half, side in zip(pair.tensors, "AB", strict=True):
                assert torch.equal(half.read(), expected[f"{layer}.lora_{side}.weight"])
    held = load_file(tmp_path / "comfyui-lora" / "lora.safetensors")
    name = "blocks.1.self_attention.linear_qkv.adapter.v.lora_A.weight"
    assert torch.equal(held["diffusion_model.blocks.1.self_attn.v.lora_down.weight"], exact[name])
    flags = ("--weights", "ema", "--dtype", "bfloat16", "--to", "comfyui-lora", tmp_path / "ema")
    assert run("--from", "megatron", tmp_path / "run", *flags) == 0
    held = load_file(tmp_path / "ema" / "lora.safetensors")
    assert torch.equal(held["diffusion_model.blocks.1.self_attn.v.lora_down.weight"], (exact[name] / 2).bfloat16())
    save_adapter(tmp_path / "phi", base, OWN)
    capsys.readouterr()
    assert run("--from", "megatron", tmp_path / "phi", "--to", "diffusers-lora", tmp_path / "x") == 1
    assert "tensors that were trained whole (conditioning." in capsys.readouterr().err
    assert run("--from", "megatron", tmp_path / "t2v", "--to", "diffusers-lora", tmp_path / "x") == 1
    assert "is a checkpoint of a full model, and no adapter" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_another_base_is_one_message(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its values, which differ in one row of one tensor; by its shapes; by its heads."""
    save_adapter(tmp_path / "run", base, OWN)
    other = {name: tensor.clone() for name, tensor in tensors_of(BASE).items()}
    other["blocks.1.mlp.linear_fc2.weight"][4] += 1e-3
    wide = dataclasses.replace(BASE, ffn_hidden_size=24)
    heads = dataclasses.replace(BASE, num_attention_heads=5)
    for config, tensors, words in (
        (BASE, other, "and the values of"),
        (wide, tensors_of(wide), "has no blocks.0.mlp.linear_fc1.weight [22, 30]"),
        (heads, other, "has no 3 attention heads"),
    ):
        root = tmp_path / f"{config.ffn_hidden_size}-{config.num_attention_heads}"
        pieces = [TensorPiece.whole(f"model.{name}", tensor) for name, tensor in tensors.items()]
        save_checkpoint(root, 1, pieces=pieces, model_config=config, state={})
        capsys.readouterr()
        flags = ("--adapter", tmp_path / "run", "--merge", "--to", "wan", tmp_path / "out")
        assert run("--from", "megatron", root, *flags) == 1
        (error,) = (line for line in capsys.readouterr().err.splitlines() if "INFO" not in line)
        assert "is for another base: it was trained beside wan:" in error and words in error
        assert "out" not in names(tmp_path)
