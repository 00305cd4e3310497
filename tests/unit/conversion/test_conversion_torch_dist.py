"""megatron-core's own distributed checkpoints: it loads what we write, and we read what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import ODD, assert_equal, checkpoint, tensors_of
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_flashi2v.checkpoint.folders import MODEL_CONFIG_NAME
from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.conversion.convert import convert, open_weights, source_with_format
from megatron_flashi2v.conversion.weights import ReadOptions
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.files import atomic_write_json


def save_with_megatron(folder: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run's later saves: an entry that is no tensor, and in ``.metadata`` the plans for the next save."""
    with single_process(resolve_device("cpu")):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
        for name in ("first", folder.name):
            path = folder.with_name(name)
            path.mkdir(parents=True)
            state = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
            state["extra"] = ShardedObject("decoder._extra_state", None, (1,), (0,))
            dist_checkpointing.save({**state, "iteration": 7}, str(path), sharded_strategy=strategy)
            monkeypatch.undo()
            monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_megatron_core_loads_what_is_written(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "run")
    convert(("megatron", tmp_path / "run"), ("torch-dist", tmp_path / "out"), verify=True)
    name = "blocks.0.mlp.linear_fc1.weight"
    rows = len(tensors[name]) // 2
    with single_process(resolve_device("cpu")):
        whole = dist_checkpointing.load(
            {key: ShardedTensor.from_rank_offsets(key, torch.empty_like(value)) for key, value in tensors.items()},
            str(tmp_path / "out"),
        )
        half = ShardedTensor.from_rank_offsets(name, torch.empty_like(tensors[name][:rows]), (0, 1, 2))
        part = dist_checkpointing.load({name: half}, str(tmp_path / "out"), validate_access_integrity=False)
    assert_equal(whole, tensors)
    assert torch.equal(part[name], tensors[name][rows:])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_our_names_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    tensors = tensors_of(ODD)
    # The optimizer's come first, under the same names behind theirs.
    state = {f"optimizer.state.exp_avg.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    state |= {prefix + name: tensor for name, tensor in tensors.items()}
    folder = tmp_path / "run" / "iter_0000007"
    save_with_megatron(folder, state, monkeypatch)
    with pytest.raises(CheckpointError, match=rf"has our names, but no {MODEL_CONFIG_NAME}"):
        open_weights("torch-dist", folder, ReadOptions())
    atomic_write_json(folder / MODEL_CONFIG_NAME, ODD.to_json())
    assert source_with_format("auto", folder) == ("torch-dist", folder)
    weights = open_weights("auto", folder, ReadOptions())
    assert weights.config == ODD
    assert_equal({name: weights.read(name) for name in tensors}, tensors)
    assert {f"optimizer.state.exp_avg.{name}" for name in tensors} < set(weights.left_out)
    assert any("_extra_state" in name for name in weights.left_out)
    with pytest.raises(CheckpointError, match="leave out --weights ema"):
        open_weights("torch-dist", folder, ReadOptions(weights="ema"))


def test_wans_names_are_read_under_either_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tensors_of(ODD)
    external = {
        name: tensor.contiguous()
        for entry in mappings(ODD, "wan")
        for name, tensor in zip(entry.external, entry.to_external(ours[entry.ours]), strict=True)
    }
    save_with_megatron(tmp_path / "run" / "iter_0000007", external, monkeypatch)
    options = ReadOptions(num_attention_heads=ODD.num_attention_heads, phi_order=ODD.phi_order, assume=ODD)
    for name in ("torch-dist", "flashi2v-gpu"):
        weights = open_weights(name, tmp_path / "run" / "iter_0000007", options)
        assert_equal({name: weights.read(name) for name in ours}, ours)


def test_what_is_no_such_folder_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match=r"run is in the format megatron, not torch-dist"):
        open_weights("torch-dist", tmp_path / "run", ReadOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no \.metadata"):
        open_weights("torch-dist", tmp_path / "empty", ReadOptions())
