"""Files that must not become a checkpoint: refused with file, tensor and rule named, and nothing left behind.

Pickles have a file of their own, ``test_conversion_torch_files.py``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ODD, checkpoint, model_tensors, names, save_checkpoint, tensors_of
from safetensors.torch import load_file, save_file

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.manifest import write_manifest
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.conversion import comparison
from megatron_flashi2v.conversion.convert import FORMATS, convert
from megatron_flashi2v.conversion.formats import original
from megatron_flashi2v.release import forward_check
from megatron_flashi2v.runtime import files

ANY_PARADIGM = tuple(name for name in FORMATS if name != "comfyui")
"""Formats that hold every model."""

FILE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
Q = "blocks.1.self_attn.q.weight"
ORIGINAL = ("wan", "flashi2v-npu", "flashi2v-gpu")


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors.update(changes)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads((folder / INDEX).read_text())
    change(document["weight_map"])
    (folder / INDEX).write_text(json.dumps(document))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize(
    ("sharded", "damage", "words"),
    [
        (False, lambda f: cut(f / FILE, 0.9), rf"{FILE} is not a whole .*; tensor \S+ ends at byte [\d,]+, the"),
        (False, lambda f: cut(f / FILE, 0.001), f"{FILE} is not a whole safetensors file"),
        (True, lambda f: next(f.glob("*3-of*")).unlink(), rf"{INDEX} says that tensor \S+ is in \S+, but there"),
        (True, lambda f: cut(next(f.glob("*3-of*")), 0.8), r"3-of-\d+.safetensors is not a whole .*; tensor \S+ ends"),
        (True, lambda f: edit_index(f, lambda m: m.update({Q: f"../{FILE}"})), f"says that tensor {Q} is in '../"),
        (True, lambda f: edit_index(f, lambda m: m.update({Q: f"/etc/{FILE}"})), f"says that tensor {Q} is in '/etc/"),
        (True, lambda f: edit_index(f, lambda m: m.update({"x": m[Q]})), "says that tensor x is in .*which does not"),
        (True, lambda f: edit_index(f, lambda m: m.pop(Q)), f"1 tensors are missing .{Q}"),
        (True, lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), "has no weight_map from tensors to files"),
        (False, lambda f: edit_tensors(f / FILE, **{Q: None}), f"1 tensors are missing .{Q}"),
        (False, lambda f: edit_tensors(f / FILE, zz=torch.ones(1)), "1 tensors are unexpected .zz"),
        (
            False,
            lambda f: edit_tensors(f / FILE, **{Q: torch.ones(30, 28)}),
            rf"{Q} in {FILE} has shape \(30, 28\) instead of \(30, 30\)",
        ),
        (False, lambda f: edit_tensors(f / FILE, **{Q: torch.ones(30, 30).half()}), "must have one dtype"),
        (
            False,
            lambda f: edit_config(f, hidden_size=36),
            rf"patch_embedding.weight in {FILE} has shape \(30, 4, 1, 2, 2\) instead of \(36, 4, 1, 2, 2\)",
        ),
        (False, lambda f: edit_config(f, num_layers=3), r"tensors are missing \(blocks.2."),
        (False, lambda f: edit_config(f, num_attention_heads=7), "model_config.json: .*num_attention_heads 7 must be"),
        (False, lambda f: edit_config(f, hiden_size=3), "unknown keys hiden_size"),
        (False, lambda f: (f / "model_config.json").write_text("["), "model_config.json: not valid JSON"),
    ],
)
def test_a_damaged_source_is_named_and_leaves_nothing(
    tmp_path: Path, sharded: bool, damage: Callable[[Path], object], words: str
) -> None:
    checkpoint(tmp_path / "run")
    convert(("megatron", tmp_path / "run"), ("wan", tmp_path / "a"), max_shard_bytes=20_000 if sharded else 10**9)
    assert (tmp_path / "a" / INDEX).exists() == sharded
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=words):
        convert(("wan", tmp_path / "a"), ("diffusers", tmp_path / "out"))
    assert names(tmp_path) == {"run", "a"}


def test_a_damaged_tensor_without_a_configuration(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    convert(("megatron", tmp_path / "run"), ("wan", tmp_path / "a"))
    for name in ("model_config.json", "config.json"):
        (tmp_path / "a" / name).unlink()
    edit_tensors(tmp_path / "a" / FILE, **{"patch_embedding.weight": torch.ones(30, 16)})
    with pytest.raises(UserError, match=rf"{FILE}: tensor patch_embedding.weight has shape \(30, 16\), not 5 sides"):
        convert(("wan", tmp_path / "a"), ("diffusers", tmp_path / "out"), num_attention_heads=3)


@pytest.mark.parametrize("name", ANY_PARADIGM)
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = checkpoint(tmp_path / "run")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UserError, match=r"out: the conversion needs \d+ MiB of disk, of which 0 MiB are free"):
        convert(("megatron", tmp_path / "run"), (name, tmp_path / "out"))
    assert names(tmp_path) == {"run"} and sum(tensor.nbytes for tensor in tensors.values()) < 10**6


@pytest.mark.parametrize("name", [
    name if name in ("megatron", "diffusers") else pytest.param(name, marks=pytest.mark.long) for name in ANY_PARADIGM
])
def test_a_disk_that_fills_meanwhile(tmp_path: Path, name: str) -> None:
    """A real one: a write past the process's limit of a file's size fails as one on a full disk does."""
    checkpoint(tmp_path / "run")
    code = (
        "import errno, os, resource, signal, sys\n"
        "from megatron_flashi2v.runtime import files\n"
        "from megatron_flashi2v.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "files._FULL += (errno.EFBIG,)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "convert", "--from", "megatron", str(tmp_path / "run"), "--to", name]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and "the disk is full" in done.stderr, done.stderr
    assert names(tmp_path) == {"run"}


def test_a_target_that_is_a_file_of_weights_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    for target in ("a.pt", "a.safetensors"):
        with pytest.raises(UserError, match=f"{target} must be a folder, of safetensors and JSON files"):
            convert(("megatron", tmp_path / "run"), ("flashi2v-npu", tmp_path / target))


@pytest.mark.parametrize("name", ANY_PARADIGM)
def test_verify_notices_what_was_written_wrongly(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one tensor, flipped on the way to the file."""
    checkpoint(tmp_path / "run")
    write = FORMATS[name].write

    def spoiling(folder: Path, *arguments: object) -> None:
        write(folder, *arguments)
        paths = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".distcp"))
        path = max(paths, key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    monkeypatch.setitem(FORMATS, name, dataclasses.replace(FORMATS[name], write=spoiling))
    convert(("megatron", tmp_path / "run"), (name, tmp_path / "unnoticed"))
    noticed = r"tensor \S+ differs from .*run/iter_0000040 in 1 of its \d+ bytes"
    if name == "megatron":  # its manifest tells before the values are compared
        noticed = r"\.safetensors is damaged: its SHA-256 differs"
    with pytest.raises(UserError, match=noticed):
        convert(("megatron", tmp_path / "run"), (name, tmp_path / "out"), verify=True)
    assert names(tmp_path) == {"run", "unnoticed"}


def test_verify_runs_a_forward_pass_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal tensors under a wrong configuration compute something else, which only the forward pass notices."""
    checkpoint(tmp_path / "run", dataclasses.replace(ODD, norm_eps=1e-6))
    run = ["convert", "--from", "megatron", str(tmp_path / "run"), "--verify", "--to"]
    for name in ANY_PARADIGM:
        assert main([*run, name, str(tmp_path / name)]) == 0
        assert "forward pass (2 of 2 blocks" in capsys.readouterr().err
    settings = forward_check._settings
    wrong = {"num_attention_heads": 5, "attention_head_dim": 6}
    monkeypatch.setattr(forward_check, "_settings", lambda *of: {**settings(*of), **wrong})
    assert main([*run, "diffusers", str(tmp_path / "out")]) == 1
    assert "a forward pass of the written weights (diffusers' WanTransformer3DModel) is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # Of a model that is too large only some blocks run.
    monkeypatch.setattr(forward_check, "MAX_BYTES", 100_000)
    assert main([*run, "wan", str(tmp_path / "few")]) == 0
    assert "forward pass (1 of 2 blocks" in capsys.readouterr().err
    monkeypatch.setattr(forward_check, "MAX_BYTES", 1000)
    assert main([*run, "wan", str(tmp_path / "none")]) == 0
    assert "no forward pass: one block of this model is too large" in capsys.readouterr().err


def test_a_nan_is_equal_to_itself_and_zero_is_not_minus_zero() -> None:
    def bits(values: list[float]) -> torch.Tensor:
        return comparison.as_bytes(torch.tensor(values))

    assert torch.equal(bits([float("nan")]), bits([float("nan")])) and not torch.equal(bits([0.0]), bits([-0.0]))


def test_no_format_reads_another_ones_names(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    for name in ORIGINAL:
        convert(("megatron", tmp_path / "run"), (name, tmp_path / name))
    for source, held in (("wan", "flashi2v-npu"), ("flashi2v-npu", "wan")):
        with pytest.raises(UserError, match=f"is in the format flashi2v-.*, not {source}; give flashi2v-"):
            convert((source, tmp_path / held), ("megatron", tmp_path / "out"))
    with pytest.raises(UserError, match="config.json: there is no such file"):
        convert(("diffusers", tmp_path / "empty"), ("megatron", tmp_path / "out"))
    shutil.copytree(tmp_path / "wan", tmp_path / "two")
    shutil.copyfile(tmp_path / "two" / FILE, tmp_path / "two" / "b.safetensors")
    with pytest.raises(UserError, match="holds b.safetensors, diffusion.*; name the file to read"):
        convert(("wan", tmp_path / "two"), ("megatron", tmp_path / "out"))
    convert(("wan", tmp_path / "two" / "b.safetensors"), ("megatron", tmp_path / "out"))
    assert model_tensors(tmp_path / "out").keys() == tensors_of(ODD).keys()


def test_a_resumed_conversion_replaces_a_killed_ones_remains(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half.safetensors").write_bytes(b"x")
    convert(("megatron", tmp_path / "run"), ("wan", tmp_path / "out"))
    assert names(tmp_path) == {"run", "out"} and original.WAN.is_ours(tmp_path / "out")


def test_a_checkpoint_with_a_hole_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(ODD)
    pieces = [TensorPiece.whole(f"model.{name}", tensor) for name, tensor in tensors.items()]
    save_checkpoint(tmp_path / "run", 1, pieces=pieces, model_config=ODD, state={})
    folder = find_checkpoint(tmp_path / "run")
    assert folder is not None
    document = json.loads((folder / "index.json").read_text())
    del document["tensors"]["model.head.linear.bias"]
    (folder / "index.json").write_text(json.dumps(document))
    write_manifest(folder, ["model_config.json", "state.json"])  # whole as far as hashes tell
    with pytest.raises(UserError, match=r"1 tensors are missing \(head.linear.bias"):
        convert(("megatron", tmp_path / "run"), ("wan", tmp_path / "out"))
    assert names(tmp_path) == {"run"}
