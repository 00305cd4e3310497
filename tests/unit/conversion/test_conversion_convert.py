"""Weights from checkpoints to diffusers folders and back, bit for bit, and the files that stand in the
way."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers.checkpoints import ODD, assert_equal, checkpoint, model_tensors, names, save_checkpoint, tensors_of
from safetensors.torch import load_file, save_file

from megatron_flashi2v.checkpoint import tensor_file
from megatron_flashi2v.checkpoint.folders import (
    find_checkpoint,
    load_model_config,
    load_state,
)
from megatron_flashi2v.checkpoint.key_table import mappings, parameter_count
from megatron_flashi2v.checkpoint.manifest import verify
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.convert import FORMAT_NAMES, ConvertConfig
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.conversion.convert import FORMATS, convert


@pytest.fixture
def run(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("conditioning", "max_shard_bytes", "bf16"),
    [
        ("flashi2v", 10**9, False),
        ("flashi2v", 5000, True),
        ("text_to_video", 10**9, True),
        ("repeat_concat", 10**9, False),
        ("zero_pad_concat", 10**9, True),
        ("inpainting", 5000, False),
    ],
)
def test_there_and_back_bit_for_bit(
    tmp_path: Path, conditioning: str, max_shard_bytes: int, bf16: bool
) -> None:
    config = dataclasses.replace(ODD, conditioning=conditioning)
    tensors = checkpoint(tmp_path / "run", config, bf16)
    export, back, again = tmp_path / "export", tmp_path / "back", tmp_path / "again"
    done = convert(("megatron", tmp_path / "run"), ("diffusers", export), max_shard_bytes=max_shard_bytes)
    assert done.parameters == parameter_count(config) and done.config == config
    assert done.bytes == sum(tensor.nbytes for tensor in tensors.values())
    convert(("diffusers", export), ("megatron", back), max_shard_bytes=max_shard_bytes)
    found = find_checkpoint(back)
    assert found is not None and found.name == "iter_0000000"
    assert load_model_config(found) == config
    assert load_state(found) == {"iteration": 0, "consumed_samples": 0}
    verify(found)
    assert_equal(model_tensors(back), tensors)
    convert(("megatron", back), ("diffusers", again), max_shard_bytes=max_shard_bytes)
    for path in export.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(export)).read_bytes(), path
    shards = list((export / "transformer").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**9)
    assert names(tmp_path) == {"run", "export", "back", "again"}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000])
def test_diffusers_loads_the_transformer(tmp_path: Path, run: Path, max_shard_bytes: int) -> None:
    convert(("megatron", run), ("diffusers", tmp_path / "export"), max_shard_bytes=max_shard_bytes)
    model, info = WanTransformer3DModel.from_pretrained(
        tmp_path / "export" / "transformer", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.num_attention_heads == 3 and model.config.eps == 1e-5
    ours, state = model_tensors(run), model.state_dict()
    assert state.keys() == {name for entry in mappings(ODD, "diffusers") for name in entry.external}
    for entry in mappings(ODD, "diffusers"):
        for name, tensor in zip(entry.external, entry.to_external(ours[entry.ours]), strict=True):
            assert torch.equal(state[name], tensor), name


def test_image_conditioning_lies_beside_it(tmp_path: Path, run: Path) -> None:
    convert(("megatron", run), ("diffusers", tmp_path / "export"))
    folder = tmp_path / "export" / "image_conditioning"
    held = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert sorted(held) == sorted(
        f"{module}.{kind}"
        for kind in ("weight", "bias")
        for module in (
            "learnable_proj.proj.0",
            "learnable_proj.proj.2",
            "fourier_embedding.0",
            "fourier_embedding.1",
        )
    )
    assert held["fourier_embedding.0.weight"].shape == (30, 4, 1, 2, 2)
    assert held["fourier_embedding.1.weight"].shape == (30, 30, 1, 1, 1)
    settings = json.loads((folder / "config.json").read_text())
    assert settings.items() >= ODD.to_json().items()
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]


def test_a_model_made_by_diffusers_is_read(tmp_path: Path) -> None:
    model = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=10,
        in_channels=4,
        out_channels=4,
        text_dim=14,
        freq_dim=16,
        ffn_dim=22,
        num_layers=1,
    )
    model.save_pretrained(tmp_path / "wan" / "transformer")
    for number, path in enumerate((tmp_path / "wan", tmp_path / "wan" / "transformer")):
        root = tmp_path / f"run{number}"
        convert(("diffusers", path), ("megatron", root))
        folder = find_checkpoint(root)
        assert folder is not None
        config = load_model_config(folder)
        assert (config.conditioning, config.num_attention_heads, config.text_length) == (
            "text_to_video",
            3,
            512,
        )
        ours = model_tensors(root)
        for entry in mappings(config, "diffusers"):
            expected = [model.state_dict()[name] for name in entry.external]
            assert torch.equal(ours[entry.ours], entry.to_ours(expected))


def test_an_image_to_video_transformer_of_wan_is_read_as_wan_i2v(tmp_path: Path) -> None:
    """Wan2.2's I2V, with four latent channels in place of sixteen: latents, mask and image are the input."""
    config = dataclasses.replace(ODD, conditioning="wan_i2v", mask_channels=4, image_dim=0)
    tensors = checkpoint(tmp_path / "run", config)
    convert(("megatron", tmp_path / "run"), ("diffusers", tmp_path / "export"))
    plain = tmp_path / "plain"
    (tmp_path / "export" / "transformer").rename(plain)
    model, info = WanTransformer3DModel.from_pretrained(plain, output_loading_info=True)
    assert not any(info.values()), info
    assert (model.config.in_channels, model.config.out_channels) == (12, 4)
    assert model.patch_embedding.weight.shape == (30, 12, 1, 2, 2)
    convert(("diffusers", plain), ("megatron", tmp_path / "back"))
    stored = load_model_config(find_checkpoint(tmp_path / "back"))
    assert (stored.conditioning, stored.mask_channels, stored.latent_channels) == ("wan_i2v", 4, 4)
    assert stored.image_dim == 0
    assert_equal(model_tensors(tmp_path / "back"), tensors)


def test_a_plain_transformer_of_an_untold_paradigm_is_refused(tmp_path: Path) -> None:
    """Twice the latents' channels: repeated or zero-padded images look the same."""
    checkpoint(tmp_path / "run", dataclasses.replace(ODD, conditioning="zero_pad_concat"))
    convert(("megatron", tmp_path / "run"), ("diffusers", tmp_path / "export"))
    (tmp_path / "export" / "transformer").rename(tmp_path / "plain")
    with pytest.raises(UserError, match="in_channels is 8 and out_channels 4.*image_conditioning/ folder"):
        convert(("diffusers", tmp_path / "plain"), ("megatron", tmp_path / "back"))


def test_dtype(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path / "run", bf16=True)
    exact = tensors_of(ODD)
    convert(("megatron", tmp_path / "run"), ("diffusers", tmp_path / "fp32"), dtype=torch.float32)
    convert(("diffusers", tmp_path / "fp32"), ("megatron", tmp_path / "back32"))
    # The masters, not the rounded weights.
    assert_equal(model_tensors(tmp_path / "back32"), exact)
    convert(("diffusers", tmp_path / "fp32"), ("megatron", tmp_path / "bf16"), dtype=torch.bfloat16)
    assert_equal(
        model_tensors(tmp_path / "bf16"), {name: tensor.bfloat16() for name, tensor in exact.items()}
    )
    convert(("megatron", tmp_path / "run"), ("megatron", tmp_path / "kept"))
    assert_equal(model_tensors(tmp_path / "kept"), stored)


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(ODD)
    tensors["head.linear.bias"][0] = 1e5
    pieces = [TensorPiece.whole(f"model.{name}", tensor) for name, tensor in tensors.items()]
    save_checkpoint(tmp_path / "run", 1, pieces=pieces, model_config=ODD, state={})
    with pytest.raises(UserError, match="head.linear.bias holds values too large for float16"):
        convert(("megatron", tmp_path / "run"), ("diffusers", tmp_path / "export"), dtype=torch.float16)
    assert names(tmp_path) == {"run"}


def edit_json(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TRANSFORMER_CONFIG, CONDITIONING_CONFIG = "transformer/config.json", "image_conditioning/config.json"
Q = "blocks.1.attn1.to_q.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]),
            "not a whole safetensors file",
        ),
        (lambda f: (f / WEIGHTS).unlink(), r"transformer holds no .safetensors"),
        (lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(Q)), f"1 tensors are missing .{Q}"),
        (
            lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update(zz=torch.ones(1))),
            "1 tensors are unexpected .zz",
        ),
        (
            lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({Q: torch.ones(30, 29)})),
            r"\(30, 29\) instead of",
        ),
        (lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({Q: t[Q].half()})), "must have one dtype"),
        (
            lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({"head.head.weight": t[Q]})),
            "1 tensors are unexpected .head.head",
        ),
        (
            lambda f: (f / "image_conditioning" / "diffusion_pytorch_model.safetensors").unlink(),
            "image_conditioning holds no .safetensors",
        ),
        (lambda f: edit_json(f / TRANSFORMER_CONFIG, num_layers=1), "num_layers is 1, but .* makes it 2"),
        (
            lambda f: edit_json(f / TRANSFORMER_CONFIG, _class_name="SanaTransformer2DModel"),
            "SanaTransformer2DModel",
        ),
        (lambda f: edit_json(f / TRANSFORMER_CONFIG, image_dim=1280), "image_dim is 1280"),
        (lambda f: edit_json(f / CONDITIONING_CONFIG, phi_order="neither"), "phi_order"),
        (lambda f: edit_json(f / CONDITIONING_CONFIG, hiden_size=1), "hiden_size"),
        (lambda f: edit_json(f / CONDITIONING_CONFIG, hidden_size="x"), "hidden_size"),
        (lambda f: (f / TRANSFORMER_CONFIG).write_text("{"), "transformer/config.json"),
        (lambda f: (f / TRANSFORMER_CONFIG).unlink(), "transformer/config.json"),
        (
            lambda f: (
                (f / TRANSFORMER_CONFIG).write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
                and (f / CONDITIONING_CONFIG).unlink()
            ),
            "no key",
        ),
    ],
)
def test_a_damaged_folder_is_named_and_leaves_nothing(
    tmp_path: Path, run: Path, damage: Callable[[Path], object], words: str
) -> None:
    convert(("megatron", run), ("diffusers", tmp_path / "export"))
    damage(tmp_path / "export")
    with pytest.raises(UserError, match=words):
        convert(("diffusers", tmp_path / "export"), ("megatron", tmp_path / "back"))
    assert names(tmp_path) == {"run", "export"}


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../../etc/passwd"}, "says that tensor a is in .*, which is not a plain file name"),
        (
            {"a": "diffusion_pytorch_model-00009-of-00009.safetensors"},
            "says that tensor a is in .*00009-of-00009.safetensors, but there is no such file",
        ),
        (None, "no weight_map"),
    ],
)
def test_a_shard_index_that_lies(tmp_path: Path, run: Path, weight_map: object, words: str) -> None:
    convert(("megatron", run), ("diffusers", tmp_path / "export"), max_shard_bytes=5000)
    index = tmp_path / "export" / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    edit_json(index, weight_map=weight_map)
    with pytest.raises(UserError, match=words):
        convert(("diffusers", tmp_path / "export"), ("megatron", tmp_path / "back"))


def test_a_mixed_dtype_may_be_cast(tmp_path: Path, run: Path) -> None:
    convert(("megatron", run), ("diffusers", tmp_path / "export"))
    edit_tensors(tmp_path / "export" / WEIGHTS, lambda t: t.update({Q: t[Q].half()}))
    convert(("diffusers", tmp_path / "export"), ("megatron", tmp_path / "back"), dtype=torch.float32)
    assert {tensor.dtype for tensor in model_tensors(tmp_path / "back").values()} == {torch.float32}


def test_targets_are_not_lost(tmp_path: Path, run: Path) -> None:
    export = ("diffusers", tmp_path / "export")
    convert(("megatron", run), export)
    with pytest.raises(UserError, match="exists; .* --overwrite"):
        convert(("megatron", run), export)
    convert(("megatron", run), export, overwrite=True, dtype=torch.bfloat16)
    assert load_file(tmp_path / "export" / WEIGHTS)[Q].dtype == torch.bfloat16
    # Neither a training run nor a folder with other things in it is replaced, whatever is asked.
    checkpoint(tmp_path / "other")
    (tmp_path / "export" / "notes.txt").write_text("mine")
    for target in (("megatron", tmp_path / "other"), export):
        with pytest.raises(UserError, match="is not an earlier conversion"):
            convert(("megatron", run), target, overwrite=True)
    for target in (run, run / "export", tmp_path):
        with pytest.raises(UserError, match="neither may lie in the other"):
            convert(("megatron", run), ("diffusers", target), overwrite=True)
    assert (tmp_path / "export" / "notes.txt").exists() and find_checkpoint(tmp_path / "other") is not None


def test_a_full_disk_leaves_the_earlier_output(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = ("diffusers", tmp_path / "export")
    convert(("megatron", run), export)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    for target in (export, ("megatron", tmp_path / "new")):
        with pytest.raises(UserError, match="disk is full"):
            convert(("megatron", run), target, overwrite=True, dtype=torch.bfloat16)
    assert names(tmp_path) == {"run", "export"}
    assert load_file(tmp_path / "export" / WEIGHTS)[Q].dtype == torch.float32


def test_bytes_are_reported(tmp_path: Path, run: Path) -> None:
    totals: dict[str, int] = {}
    done: dict[str, int] = {}

    def start(what: str, total: int) -> None:
        totals[what], done[what] = total, 0

    def advance(count: int) -> None:
        done[list(done)[-1]] += count

    convert(
        ("megatron", run), ("diffusers", tmp_path / "export"), verify=True, on_start=start, on_bytes=advance
    )
    assert list(totals) == ["convert", "verify"] and done == totals


def test_command_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = tmp_path / "export"
    arguments = ["convert", "--from", "megatron", str(run), "--to", "diffusers", str(export)]
    assert main([*arguments, "--dtype", "bfloat16", "--max-shard-size", "5KB"]) == 0
    assert len(list((export / "transformer").glob("*.safetensors"))) > 1
    capsys.readouterr()
    assert main(arguments) == 1
    assert f"{export} exists" in capsys.readouterr().err
    assert main(["convert", "--from", "pth", "x", "--to", "diffusers", "y"]) == 2
    assert "--from is 'pth'; it must be one of megatron, diffusers, wan" in capsys.readouterr().err
    assert main(["convert", "--from", "megatron", str(tmp_path / "none"), "--to", "diffusers", "y"]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2gib", 2 * 2**30), ("700", 700)],
)
def test_shard_sizes(text: str, size: int) -> None:
    pair = ("megatron", Path("x"))
    assert ConvertConfig(source=pair, target=pair, max_shard_size=text).max_shard_bytes == size
    for wrong in ("5XB", "", "0GB", "-1GB", "GB", "5I"):
        with pytest.raises(UserError, match="max-shard-size"):
            ConvertConfig(source=pair, target=pair, max_shard_size=wrong)


def test_the_formats_announced_are_those_that_work() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys\nfrom megatron_flashi2v.cli import convert\ntry:\n    convert.main(['--help'])\n"
        "except SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-shard-size" in done.stdout
