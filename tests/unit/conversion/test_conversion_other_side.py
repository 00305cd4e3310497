"""What other software needs of our exports, and what other trainers leave for us to read."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import ODD, checkpoint, names, tensors_of
from safetensors.torch import load_file

from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.convert import convert, open_weights
from megatron_flashi2v.conversion.weights import ReadOptions, Weights

FLAGS = ReadOptions(num_attention_heads=3, phi_order="repeat_then_conv")
# Two heads of 128, as ComfyUI takes for granted.
COMFYUI = ModelConfig(
    num_layers=1, hidden_size=256, ffn_hidden_size=32, num_attention_heads=2, text_dim=16, conditioning="text_to_video"
)


def npu_tensors(scale: float = 1.0) -> dict[str, torch.Tensor]:
    ours = tensors_of(ODD)
    return {
        name: (tensor * scale).clone()
        for entry in mappings(ODD, "flashi2v_npu")
        for name, tensor in zip(entry.external, entry.to_external(ours[entry.ours]), strict=True)
    }


def assert_holds(weights: Weights, scale: float) -> None:
    for name, tensor in tensors_of(ODD).items():
        assert torch.equal(weights.read(name), tensor * scale), name


@pytest.mark.parametrize("conditioning", ["text_to_video", "inpainting"])
def test_comfyui_gets_one_file_of_one_dtype_behind_its_prefix(tmp_path: Path, conditioning: str) -> None:
    config = dataclasses.replace(COMFYUI, conditioning=conditioning)
    checkpoint(tmp_path / "run", config, bf16=True)
    run, out = ("megatron", tmp_path / "run"), ("comfyui", tmp_path / "out")
    done = convert(run, out, max_shard_bytes=10_000, verify=True)
    assert names(tmp_path / "out") == {"model.safetensors", "model_config.json"}
    held, ours = load_file(tmp_path / "out" / "model.safetensors"), tensors_of(config)
    for entry in mappings(config, "wan"):
        for name, part in zip(entry.external, entry.to_external(ours[entry.ours]), strict=True):
            assert torch.equal(held.pop(f"model.diffusion_model.{name}"), part)  # fp32, from the masters
    assert not held and any("wrote float32" in note for note in done.report.notes)
    assert any("grey frames" in note for note in done.report.notes) == (conditioning == "inpainting")
    convert(run, out, overwrite=True, dtype=torch.bfloat16)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    (tmp_path / "out" / "model_config.json").unlink()
    # Without its configuration a model with a mask is taken for Wan's own, which has as many channels.
    taken_for = {"text_to_video": "text_to_video", "inpainting": "wan_i2v"}
    assert open_weights("auto", tmp_path / "out", ReadOptions()).config.conditioning == taken_for[conditioning]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 4}, "takes head_dim 128 for granted and would compute this model, of 64, wrongly"),
        ({"norm_eps": 1e-5}, "takes norm_eps 1e-06 for granted"),
        ({"freq_dim": 128}, "takes freq_dim 256 for granted"),
        ({"patch_size": (1, 1, 2)}, r"takes patch_size \(1, 2, 2\) for granted"),
        ({"conditioning": "flashi2v"}, "has no code for the paradigm flashi2v .* use --to diffusers"),
        ({"conditioning": "repeat_concat"}, "has no code for the paradigm repeat_concat"),
    ],
)
def test_what_comfyui_would_compute_wrongly_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    checkpoint(tmp_path / "run", dataclasses.replace(COMFYUI, **changes))
    with pytest.raises(UserError, match=f"ComfyUI {words}"):
        convert(("megatron", tmp_path / "run"), ("comfyui", tmp_path / "out"))
    assert names(tmp_path) == {"run"}


@pytest.mark.parametrize("form", ["flashi2v-gpu", "flashi2v-npu"])
def test_branches_of_flashi2v_get_one_file_of_one_dtype(tmp_path: Path, form: str) -> None:
    """Their loaders take one file, and their FSDP refuses a model of two dtypes."""
    checkpoint(tmp_path / "run", bf16=True)
    convert(("megatron", tmp_path / "run"), (form, tmp_path / "out"), max_shard_bytes=10_000)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    source = ("megatron", tmp_path / "run")
    with pytest.raises(UserError, match=f"--max-shard-size 1GB: {form} is read as one file"):
        ConvertConfig(source=source, target=(form, tmp_path / "x"), max_shard_size="1GB")


def test_what_the_other_side_drops_is_said(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    (note,) = convert(("megatron", tmp_path / "run"), ("wan", tmp_path / "a")).report.notes
    assert note.startswith("Wan's own code has no place for 8 tensors") and "text-to-video" in note
    for conditioning, words in (("inpainting", "Wan2.2's I2V code runs it"), ("text_to_video", "")):
        checkpoint(tmp_path / conditioning, dataclasses.replace(ODD, conditioning=conditioning))
        done = convert(("megatron", tmp_path / conditioning), ("wan", tmp_path / f"{conditioning}-wan"))
        assert [words in note for note in done.report.notes] == ([True] if words else [])


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.Namespace]:
    """Arguments as Megatron's fork keeps them in a checkpoint: with an enumeration of its own, and numpy's state."""
    module = types.ModuleType("megatron.core.enums_of_a_fork")
    code = "import enum\nclass ModelType(enum.Enum):\n    unet = 3\n"
    exec(code, module.__dict__)
    module.ModelType.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield argparse.Namespace(
        model_type=module.ModelType.unet, lr=2e-5, params_dtype=torch.bfloat16, device=torch.device("cpu"),
        betas=np.array([0.9, 0.999]), scale=np.float64(2.0),
    )  # fmt: skip


def write_trainer(folder: Path, arguments: argparse.Namespace, scale: float = 1.0) -> Path:
    (folder / "mp_rank_00").mkdir(parents=True)
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    random = {"np_rng_state": np.random.RandomState(1).get_state(), "cpu": torch.get_rng_state()}
    model = npu_tensors(scale)
    state = {"args": arguments, "iteration": 20, "checkpoint_version": 3.0, "model": model, "rng_state": [random]}
    torch.save(state, path)
    return path


def test_a_run_of_megatrons_fork(tmp_path: Path, trainer: argparse.Namespace) -> None:
    """Its top folder gives the iteration that its tracker names; any folder below, and the file itself, are read."""
    for iteration, scale in ((10, 0.5), (20, 1.0), (30, 2.0)):
        path = write_trainer(tmp_path / f"iter_{iteration:07d}", trainer, scale)
        torch.save({"model": npu_tensors(-scale)}, path.with_name(f"{path.name}.ema"))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20\n")
    weights = open_weights("auto", tmp_path, FLAGS)
    assert_holds(weights, 1.0)
    assert "took iter_0000020, the newest of its iterations" in weights.notes
    assert {"iteration", "args", "checkpoint_version"} <= set(weights.left_out)
    assert_holds(open_weights("flashi2v-npu", tmp_path, dataclasses.replace(FLAGS, weights="ema")), -1.0)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    for path in (tmp_path, tmp_path / "iter_0000030", tmp_path / "iter_0000030" / "mp_rank_00"):
        assert_holds(open_weights("flashi2v-npu", path, FLAGS), 2.0)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    with pytest.raises(UserError, match="names iteration 40, which is missing; name one of iter_0000010, iter_0000020"):
        open_weights("flashi2v-npu", tmp_path, FLAGS)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    write_trainer(tmp_path / "release", trainer, 3.0)
    assert_holds(open_weights("flashi2v-npu", tmp_path, FLAGS), 3.0)


def test_a_divided_model_of_megatrons_fork_is_named(tmp_path: Path, trainer: argparse.Namespace) -> None:
    write_trainer(tmp_path, trainer)
    (tmp_path / "mp_rank_01").mkdir()
    with pytest.raises(UserError, match=r"divided over 2 model-parallel ranks \(mp_rank_00 to mp_rank_01\)"):
        open_weights("flashi2v-npu", tmp_path, FLAGS)


def test_the_newest_iteration_of_flashi2v_main(tmp_path: Path) -> None:
    for iteration, scale in ((9000, 0.5), (10000, 1.0)):
        folder = tmp_path / f"iter_{iteration:09d}"
        folder.mkdir()
        for name, sign in (("model_state_dict.pt", 1), ("ema_model_state_dict.pt", -1)):
            ours = tensors_of(ODD)
            state = {
                external: part * scale * sign
                for entry in mappings(ODD, "wan")
                for external, part in zip(entry.external, entry.to_external(ours[entry.ours]), strict=True)
            }
            torch.save(state, folder / name)
    assert_holds(open_weights("auto", tmp_path, FLAGS), 1.0)
    assert_holds(open_weights("flashi2v-gpu", tmp_path, dataclasses.replace(FLAGS, weights="ema")), -1.0)
