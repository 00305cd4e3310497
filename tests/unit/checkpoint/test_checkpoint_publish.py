"""Folders under --save: whole or absent, and found again."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import read_full, save_checkpoint
from helpers.ranks import run_ranks

from megatron_flashi2v.checkpoint import saving, tensor_file
from megatron_flashi2v.checkpoint.folders import (
    find_checkpoint,
    load_model_config,
    load_state,
    require_same_model,
)
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.model_state import MODEL_PREFIX
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.saving import CheckpointSave
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.distributed import shutdown

CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=4,
    ffn_hidden_size=4,
    num_attention_heads=2,
    latent_channels=2,
    freq_dim=4,
    text_dim=4,
    text_length=4,
    phi_hidden_channels=2,
)


def whole_model(value: float) -> list[TensorPiece]:
    return [
        TensorPiece.whole(MODEL_PREFIX + name, torch.full(shape, value))
        for name, shape in parameter_shapes(CONFIG).items()
    ]


def save(root: Path, iteration: int, value: float = 0.0) -> Path:
    return save_checkpoint(
        root,
        iteration,
        pieces=whole_model(value),
        model_config=CONFIG,
        state={"iteration": iteration, "loss": 0.1 + 0.2},
    )


def value_of(folder: Path | None) -> float:
    assert folder is not None
    return read_full(folder, "model.head.linear.bias")[0].item()


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_saved_is_found_and_read(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "a"
    folder = save(root, 10, 1.0)
    assert folder == root / "iter_0000010" == find_checkpoint(root) == find_checkpoint(folder)
    assert load_state(folder) == {"iteration": 10, "loss": 0.1 + 0.2}
    assert load_model_config(folder) == CONFIG
    save(root, 20, 2.0)
    assert (root / "latest_checkpointed_iteration.txt").read_text().strip() == "20"
    assert value_of(find_checkpoint(root)) == 2.0
    assert value_of(find_checkpoint(root, 10)) == 1.0
    assert names(root) == {"iter_0000010", "iter_0000020", "latest_checkpointed_iteration.txt"}


def test_absent_and_empty_start_anew(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") is None
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "config.yaml").write_text("a: 1")  # a run that was killed before its first save
    (tmp_path / ".iter_0000010.partial").mkdir()
    assert find_checkpoint(tmp_path) is None


def test_a_run_killed_before_the_tracker_was_written_resumes(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20, 2.0)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert value_of(find_checkpoint(tmp_path)) == 2.0


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (
            lambda root: (root / "iter_0000010").rename(root / "iter_0000020"),
            "iter_0000010 is missing.*: 20",
        ),
        (
            lambda root: (root / "iter_0000010" / "index.json").unlink(),
            "no whole checkpoint: .*index.json cannot be read",
        ),
        (lambda root: (root / "model_index.json").write_text("{}"), "exported model"),
    ],
)
def test_a_folder_that_cannot_be_resumed_is_named(
    tmp_path: Path, prepare: Callable[[Path], object], words: str
) -> None:
    save(tmp_path, 10)
    prepare(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"30", b"1e3", b"\xff\xfe\x00"])
def test_a_damaged_tracker_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    save(tmp_path, 10, 1.0)
    save(tmp_path, 20, 2.0)
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(content)
    assert value_of(find_checkpoint(tmp_path)) == 2.0
    assert "latest_checkpointed_iteration.txt" in caplog.text


def test_a_tracker_may_be_set_back(tmp_path: Path) -> None:
    save(tmp_path, 10, 1.0)
    save(tmp_path, 20, 2.0)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert value_of(find_checkpoint(tmp_path)) == 1.0


def test_other_wrong_roots(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="iter_0000040 is missing"):
        find_checkpoint(tmp_path, 40)
    with pytest.raises(CheckpointError, match="is a file"):
        find_checkpoint(tmp_path / "latest_checkpointed_iteration.txt")
    (tmp_path / "iter_0000010" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json cannot be read.*; load another checkpoint"):
        find_checkpoint(tmp_path / "iter_0000010")


def fail_when(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, fails: Callable[[str], bool]
) -> None:
    """Let a function of ``os`` fail with a full disk for some of its first arguments."""
    original = getattr(os, name)

    def maybe(*arguments: object, **keywords: object) -> object:
        if fails(str(arguments[0])):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, maybe)


@pytest.mark.parametrize("moment", ["tensors", "config", "state", "rename", "tracker"])
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, 10, 1.0)
    before = names(tmp_path)
    if moment == "tensors":
        fail_when(monkeypatch, tensor_file.os, "fsync", lambda _: True)
    elif moment == "rename":
        fail_when(monkeypatch, saving.os, "rename", lambda path: path.endswith("20.partial"))
    else:
        part = {"config": "model_config.json", "state": "state.json", "tracker": "latest"}[moment]
        kind = "atomic_write_text" if moment == "tracker" else "atomic_write_json"
        original = getattr(saving, kind)

        def maybe(path: Path, value: object) -> None:
            if part in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            original(path, value)

        monkeypatch.setattr(saving, kind, maybe)
    for iteration in (20, 10):  # a new checkpoint, and the same one written again
        with pytest.raises(CheckpointError, match="[Dd]isk is full|No space left"):
            if moment == "rename" and iteration == 10:
                fail_when(monkeypatch, saving.os, "rename", lambda path: path.endswith("10.partial"))
            save(tmp_path, iteration, 2.0)
        assert names(tmp_path) == before
        assert value_of(find_checkpoint(tmp_path)) == 1.0
    monkeypatch.undo()
    save(tmp_path, 20, 2.0)
    assert value_of(find_checkpoint(tmp_path)) == 2.0


def test_stale_partial_folders_are_cleared_and_a_second_save_replaces(tmp_path: Path) -> None:
    for name in (".iter_0000010.partial", ".iter_0000007.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("rubbish")
    save(tmp_path, 10, 1.0)
    save(tmp_path, 10, 2.0)
    assert names(tmp_path) == {"iter_0000010", "latest_checkpointed_iteration.txt"}
    assert value_of(find_checkpoint(tmp_path)) == 2.0


def test_a_run_killed_while_it_replaced_a_checkpoint_resumes_from_the_old_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 10, 1.0)
    folder.rename(tmp_path / ".iter_0000010.replaced")
    assert value_of(find_checkpoint(tmp_path)) == 1.0
    save(tmp_path, 10, 2.0)
    assert value_of(find_checkpoint(tmp_path)) == 2.0
    assert names(tmp_path) == {"iter_0000010", "latest_checkpointed_iteration.txt"}


@pytest.mark.parametrize("fault", ["missing", "slice", "extra"])
def test_a_checkpoint_that_is_not_the_whole_model_is_refused(tmp_path: Path, fault: str) -> None:
    pieces = {piece.key: piece for piece in whole_model(0.0)}
    key = "model.blocks.0.mlp.linear_fc2.weight"
    if fault == "missing":
        del pieces[key]
    elif fault == "slice":  # as from a parameter without its tensor-parallel tag
        pieces[key] = TensorPiece.whole(key, torch.zeros(4, 2))
    else:
        pieces["model.extra"] = TensorPiece.whole("model.extra", torch.zeros(2))
    with pytest.raises(CheckpointError, match="extra" if fault == "extra" else "linear_fc2.weight"):
        save_checkpoint(tmp_path, 1, pieces=pieces.values(), model_config=CONFIG, state={})
    assert not names(tmp_path)


def test_state_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="saving .*iter_0000001 failed"):
        save_checkpoint(tmp_path, 1, pieces=whole_model(0.0), model_config=CONFIG, state={"a": object()})
    assert not names(tmp_path)


def test_another_model_is_refused_with_all_differences() -> None:
    other = dataclasses.replace(CONFIG, num_layers=2, phi_order="repeat_then_conv")
    require_same_model(CONFIG, CONFIG, "here")
    with pytest.raises(CheckpointError) as caught:
        require_same_model(CONFIG, other, "here")
    message = str(caught.value)
    assert "num_layers is 1 in the checkpoint, 2 was asked for" in message
    assert "repeat_then_conv" in message and "here" in message and "hidden_size" not in message


@pytest.mark.parametrize("name", ["state.json", "model_config.json"])
def test_damaged_json_is_named(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 10)
    load = load_state if name == "state.json" else load_model_config
    for content in ("{", "[1]", None):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        with pytest.raises(CheckpointError, match=name):
            load(folder)


def two_ranks(rank: int, folder: Path) -> None:
    """Rank 1 fails in one save after the other; both ranks must see it, and neither may hang."""
    dist.init_process_group("gloo")
    root = folder / "run"
    shapes = parameter_shapes(CONFIG)

    def halves(value: float, broken: Callable[[list[TensorPiece]], None] | None = None) -> int:
        pieces = [
            TensorPiece(
                key=MODEL_PREFIX + name,
                global_shape=shape,
                offset=(shape[0] // 2 * rank, *(0 for _ in shape[1:])),
                shape=(shape[0] // 2, *shape[1:]),
                data=torch.full((shape[0] // 2, *shape[1:]), value),
            )
            for name, shape in shapes.items()
        ]
        if broken is not None and rank == 1:
            broken(pieces)
        try:
            save_checkpoint(
                root,
                int(value),
                pieces=pieces,
                model_config=CONFIG,
                state={"rank": rank},
                rank=rank,
                world_size=2,
            )
        except CheckpointError as error:
            assert "rank 1 of 2" in str(error) or "exactly once" in str(error), error
            return 1
        return 0

    assert halves(1.0) == 0
    assert halves(2.0, lambda pieces: pieces.append(None)) == 1  # type: ignore[arg-type]
    assert halves(3.0, lambda pieces: pieces.pop() and None) == 1
    assert halves(4.0) == 0
    dist.barrier()
    if rank == 0:
        assert names(root) == {"iter_0000001", "iter_0000004", "latest_checkpointed_iteration.txt"}
        found = find_checkpoint(root)
        assert found is not None and found.name == "iter_0000004"
        assert load_state(found) == {"rank": 0}
        for name, shape in shapes.items():
            assert torch.equal(read_full(found, MODEL_PREFIX + name), torch.full(shape, 4.0))
    shutdown()


def test_an_error_on_one_rank_reaches_all(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path, tmp_path)


def steps(root: Path, value: float) -> CheckpointSave:
    return CheckpointSave(
        root, 10, pieces=whole_model(value), model_config=CONFIG, state={"iteration": 10}, peers=Peers(0, 1)
    )


def test_nothing_is_published_before_the_last_step(tmp_path: Path) -> None:
    save_in_steps, seen = steps(tmp_path, 1.0), []
    while not save_in_steps.done:
        assert find_checkpoint(tmp_path) is None
        save_in_steps.work()
        save_in_steps.settle()
        seen.append(names(tmp_path))
    partial = {".iter_0000010.partial"}
    assert seen == [partial, partial, {"iter_0000010", "latest_checkpointed_iteration.txt"}]
    assert value_of(find_checkpoint(tmp_path)) == 1.0


def test_a_save_that_is_given_up_ends_with_the_next_tensor(tmp_path: Path) -> None:
    given_up = steps(tmp_path, 1.0)
    given_up.work()
    given_up.settle()
    given_up.abandon()
    given_up.work()
    written = sum(path.stat().st_size for path in (tmp_path / ".iter_0000010.partial").iterdir())
    with pytest.raises(CheckpointError, match="abandoned"):
        given_up.settle()
    assert given_up.done and not names(tmp_path)
    file = save(tmp_path, 10) / "tensors-00000-of-00001.safetensors"
    assert written < 0.9 * file.stat().st_size


def test_the_state_is_as_of_the_beginning(tmp_path: Path) -> None:
    state = {"clipper": {"mean": 1.0}}
    late = CheckpointSave(
        tmp_path, 10, pieces=whole_model(0.0), model_config=CONFIG, state=state, peers=Peers(0, 1)
    )
    state["clipper"]["mean"] = 2.0
    late.finish()
    assert load_state(late.folder) == {"clipper": {"mean": 1.0}}
