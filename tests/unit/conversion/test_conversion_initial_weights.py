"""A run's first weights: from any format, into any paradigm, each rank's share and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ODD, checkpoint
from helpers.paradigms import PARADIGMS

from megatron_flashi2v.checkpoint import storage
from megatron_flashi2v.checkpoint.arrangements import Box
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.config.errors import ConfigError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import CheckpointArguments
from megatron_flashi2v.conversion.convert import FORMATS, convert
from megatron_flashi2v.conversion.initial_weights import load_initial_weights, open_initial_weights
from megatron_flashi2v.conversion.sources import SafetensorsTensor, SourceTensor
from megatron_flashi2v.conversion.torch_archive import ArchivedTensor
from megatron_flashi2v.models.weight_shards import WeightShard, whole_weights
from megatron_flashi2v.parallel.placement import ShardGrid

ANY_PARADIGM = tuple(name for name in FORMATS if name != "comfyui")
"""Formats that hold every model."""

# As the model's layers divide: rows of column-parallel linears and heads' norms, columns of row-parallel linears.
ROWS = ("linear_qkv", "linear_q", "linear_kv", "norm_q", "norm_k", "linear_fc1", "text_embedding.linear_1",
        "projection")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight", "text_embedding.linear_2.weight")
SMALL = dataclasses.replace(ODD, num_attention_heads=5, ffn_hidden_size=20, phi_kernel_size=(1, 3, 3))


def parameters(config: ModelConfig, tp_size: int = 1, blocks: tuple[int, ...] | None = None) -> dict[str, torch.Tensor]:
    """A rank's parameters, filled with -1."""
    held = {}
    for name, shape in parameter_shapes(config).items():
        if blocks is not None and name.startswith("blocks.") and int(name.split(".")[1]) not in blocks:
            continue
        local, axis = list(shape), sliced_axis(name)
        if axis is not None:
            local[axis] //= tp_size
        held[name] = torch.nn.Parameter(torch.full(local, -1.0))
    return held


def sliced_axis(name: str) -> int | None:
    """The dimension that tensor-parallel ranks divide."""
    return 0 if name.rpartition(".")[0].endswith(ROWS) else 1 if name.endswith(COLUMNS) else None


@pytest.mark.parametrize("name", ANY_PARADIGM)
def test_every_format_and_only_the_bytes_that_are_needed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank of TP 5 on a stage of one of two blocks: a slice of each sharded tensor of that block."""
    tensors = checkpoint(tmp_path / "run", SMALL)
    path = tmp_path / "run"
    if name != "megatron":
        path = tmp_path / "out"
        convert(("megatron", tmp_path / "run"), (name, path))
    read: list[int] = []
    read_tensor = storage.read_tensor

    def counted(*arguments: object) -> torch.Tensor:
        values = read_tensor(*arguments)
        read.append(values.numel())
        return values

    monkeypatch.setattr(storage, "read_tensor", counted)
    for kind in (SafetensorsTensor, ArchivedTensor):
        def counted_read(
            self: SourceTensor, box: Box | None = None, read_it: Callable[..., torch.Tensor] = kind.read
        ) -> torch.Tensor:
            values = read_it(self, box)
            read.append(values.numel())
            return values

        monkeypatch.setattr(kind, "read", counted_read)
    wanted = parameters(SMALL, tp_size=5, blocks=(1,))
    initial = open_initial_weights((name, path), SMALL)
    assert not (initial.missing or initial.unexpected)
    load_initial_weights(initial, whole_weights(wanted.items(), ShardGrid(tp_rank=3, tp_size=5)))
    for key, parameter in wanted.items():
        whole = tensors[key]
        axis = sliced_axis(key)
        expected = whole if axis is None else whole.chunk(5, dim=axis)[3]
        assert torch.equal(parameter.detach(), expected), key
    held = sum(parameter.numel() for parameter in wanted.values())
    assert held <= sum(read) < 1.05 * held
    assert held < 0.6 * sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("source", ["text_to_video", "flashi2v"])
@pytest.mark.parametrize("run", PARADIGMS)
def test_text_to_video_and_flashi2v_weights_suit_every_paradigm(tmp_path: Path, source: str, run: str) -> None:
    found, model = (dataclasses.replace(SMALL, conditioning=name) for name in (source, run))
    tensors = checkpoint(tmp_path / "run", found)
    convert(("megatron", tmp_path / "run"), ("wan", tmp_path / "wan"))
    initial = open_initial_weights(("wan", tmp_path / "wan"), model)
    own = {name for name in parameter_shapes(SMALL) if name.startswith("conditioning.")}
    branch = {name for name in parameter_shapes(model) if "image" in name}
    assert bool(branch) == (run == "wan_i2v")
    assert set(initial.missing) == (own if run == "flashi2v" != source else branch)
    assert set(initial.unexpected) == (own if source == "flashi2v" != run else set())
    first = "image_embedding" if branch else "conditioning.phi"
    assert (f"are missing and start as initialised ({first}" in initial.summary) == bool(initial.missing)
    assert ("unexpected and left out (conditioning.phi" in initial.summary) == bool(initial.unexpected)
    wanted = parameters(model)
    load_initial_weights(initial, whole_weights(wanted.items(), ShardGrid()))
    for name, parameter in wanted.items():
        if name in initial.missing:
            assert (parameter == -1).all()
        elif name == "patch_embedding.weight":
            columns = tensors[name].shape[1]
            assert torch.equal(parameter[:, :columns], tensors[name]) and (parameter[:, columns:] == -1).all()
        else:
            assert torch.equal(parameter.detach(), tensors[name]), name
    in_stretches = parameters(model)
    shards = whole_weights(in_stretches.items(), ShardGrid())
    load_initial_weights(initial, [stretch for shard in shards for stretch in stretches(shard)])
    assert all(torch.equal(in_stretches[name], parameter) for name, parameter in wanted.items())


def stretches(shard: WeightShard) -> list[WeightShard]:
    """A third of the weight, none of it, and the rest."""
    count = shard.data.numel()
    ranges = [(0, count // 3), (count // 3, count // 3), (count // 3, count)]
    return [dataclasses.replace(shard, flat_range=part, data=shard.data.view(-1)[slice(*part)]) for part in ranges]


def test_weights_that_do_not_suit_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", dataclasses.replace(SMALL, conditioning="inpainting"))
    run = ("megatron", tmp_path / "run")
    with pytest.raises(UserError, match="conditioning is inpainting in the checkpoint, text_to_video was asked for"):
        open_initial_weights(run, SMALL)
    for change in ({"ffn_hidden_size": 24}, {"num_layers": 3}, {"num_attention_heads": 3}):
        field, value = next(iter(change.items()))
        model = dataclasses.replace(SMALL, conditioning="inpainting", **change)
        with pytest.raises(UserError, match=f"{field} is .* in the checkpoint, {value} was asked for"):
            open_initial_weights(run, model)
    with pytest.raises(UserError, match="holds no EMA weights"):
        open_initial_weights(run, dataclasses.replace(SMALL, conditioning="inpainting"), "ema")


def test_only_the_paradigms_own_fields_must_agree(tmp_path: Path) -> None:
    """phi's kernel and the mask's channels mean nothing to a text-to-video model."""
    other = {"phi_kernel_size": (3, 3, 3), "mask_channels": 2}
    for name in ("text_to_video", "flashi2v", "inpainting"):
        checkpoint(tmp_path / name, dataclasses.replace(SMALL, conditioning=name, **other))
    run, model = ("megatron", tmp_path / "text_to_video"), dataclasses.replace(SMALL, conditioning="text_to_video")
    assert not open_initial_weights(run, model).missing
    for name, field, stays in (("flashi2v", "phi_kernel_size", "mask"), ("inpainting", "mask_channels", "phi")):
        with pytest.raises(UserError, match=f"{field} is .* in the checkpoint") as caught:
            open_initial_weights(("megatron", tmp_path / name), dataclasses.replace(SMALL, conditioning=name))
        assert f"{stays}_" not in str(caught.value)


def test_what_a_file_does_not_tell_is_as_in_the_run(tmp_path: Path) -> None:
    """Heads of six channels; and phi's order, which only matters where its kernel spans time."""
    checkpoint(tmp_path / "run", ODD)
    convert(("megatron", tmp_path / "run"), ("wan", tmp_path / "wan"))
    for name in ("model_config.json", "config.json"):
        (tmp_path / "wan" / name).unlink()
    model = dataclasses.replace(ODD, norm_eps=1e-6)
    assert open_initial_weights(("wan", tmp_path / "wan"), model).weights.config.num_attention_heads == 3
    with pytest.raises(UserError, match="phi_order is conv_then_broadcast in the checkpoint, repeat_then_conv was"):
        open_initial_weights(("flashi2v-gpu", tmp_path / "wan"), model)
    flat = dataclasses.replace(SMALL, norm_eps=1e-6)
    checkpoint(tmp_path / "flat", flat)
    for name in ("flashi2v-gpu", "flashi2v-npu"):
        convert(("megatron", tmp_path / "flat"), (name, tmp_path / name))
        (tmp_path / name / "model_config.json").unlink()
        assert not open_initial_weights((name, tmp_path / name), flat).missing


def test_the_flag_names_a_format_and_a_path() -> None:
    def source(text: str | None) -> tuple[str, Path] | None:
        return CheckpointArguments(load_weights=text).load_weights_source

    assert source(None) is None
    assert source("flashi2v-npu:a:b/c.pt") == ("flashi2v-npu", Path("a:b/c.pt"))
    for wrong in ("runs/a", "wan", "wan:", "pt:x", ":x"):
        with pytest.raises(ConfigError, match="--load-weights is .*; give FORMAT:PATH with one of megatron, diffusers"):
            source(wrong)
