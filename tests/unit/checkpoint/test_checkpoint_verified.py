"""Damaged checkpoints are noticed, whatever the byte, and the one before is loaded; old ones are deleted in time."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import ODD, checkpoint, names, save_checkpoint
from helpers.ranks import run_ranks

from megatron_flashi2v.checkpoint import manifest
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.manifest import verify
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.retention import Retention
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.errors import CheckpointError, StorageError
from megatron_flashi2v.runtime.distributed import shutdown


def save(root: Path, iteration: int, retention: Retention | None = None) -> Path:
    pieces = [
        TensorPiece.whole(f"{prefix}.{name}", torch.full(shape, float(iteration)))
        for name, shape in parameter_shapes(ODD).items() for prefix in ("model", "optimizer.exp_avg")
    ]
    return save_checkpoint(
        root, iteration, pieces=pieces, model_config=ODD, state={"iteration": iteration},
        retention=retention or Retention(),
    )


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """All bytes of the manifest; of the other files the ends and a sample between."""
    checkpoint(tmp_path)
    folder = find_checkpoint(tmp_path)
    assert folder is not None
    assert names(folder) == {
        "manifest.json", "index.json", "model_config.json", "state.json", "tensors-00000-of-00001.safetensors"
    }
    flips = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        last = len(content) - 1
        places = range(len(content)) if path.name == "manifest.json" else {0, 7, 8, last // 2, last - 1, last}
        for place in places:
            flip(path, place, bit=place % 8)
            with pytest.raises(CheckpointError, match="damaged") as caught:
                verify(folder)
            assert str(path) in str(caught.value)
            path.write_bytes(content)
            flips += 1
    assert flips > 500
    verify(folder)


@pytest.mark.parametrize("change", ["truncated", "longer", "missing"])
def test_a_file_of_another_length_is_noticed(tmp_path: Path, change: str) -> None:
    folder = save(tmp_path, 10)
    for path in folder.iterdir():
        content = path.read_bytes()
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if change == "truncated" else content + b" ")
        with pytest.raises(CheckpointError, match=path.name):
            verify(folder)
        path.write_bytes(content)


def test_the_checkpoint_before_a_damaged_one_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for iteration in (10, 20, 30):
        save(tmp_path, iteration)
    path = tmp_path / "iter_0000030" / "tensors-00000-of-00001.safetensors"
    flip(path, 5000)
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000020"
    assert str(path) in caplog.text and "SHA-256" in caplog.text and "skipping" in caplog.text
    flip(tmp_path / "iter_0000020" / "state.json", 3)
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000010"
    # What is asked for by name is what is loaded, or nothing.
    with pytest.raises(CheckpointError, match="SHA-256.*load another"):
        find_checkpoint(tmp_path / "iter_0000030")
    with pytest.raises(CheckpointError, match="SHA-256"):
        find_checkpoint(tmp_path, 30)
    flip(tmp_path / "iter_0000010" / "manifest.json", 60)
    with pytest.raises(CheckpointError, match="no whole checkpoint.*0030.*0020.*0010"):
        find_checkpoint(tmp_path)


def test_files_without_what_is_needed_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 10)
    read: list[str] = []
    original = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: read.append(path.name) or original(path))
    verify(folder, needs=lambda key: key.startswith("ema."))
    assert sorted(read) == ["index.json", "model_config.json", "state.json"]


@pytest.mark.parametrize(("retention", "kept"), [
    (Retention(), [1, 2, 3, 4, 5, 6]),
    (Retention(last=1), [6]),
    (Retention(last=2), [5, 6]),
    (Retention(last=9), [1, 2, 3, 4, 5, 6]),
    (Retention(last=1, every=2), [2, 4, 6]),
    (Retention(last=2, every=3), [3, 5, 6]),
])
def test_old_checkpoints_are_deleted(tmp_path: Path, retention: Retention, kept: list[int]) -> None:
    for iteration in range(1, 7):
        save(tmp_path, iteration, retention)
    assert names(tmp_path) == {f"iter_{number:07d}" for number in kept} | {"latest_checkpointed_iteration.txt"}


def test_later_checkpoints_do_not_count(tmp_path: Path) -> None:
    """A run that fell back from damaged checkpoints must not delete good ones for their sake, not even past them."""
    for iteration in (10, 20, 30):
        save(tmp_path, iteration)
    for iteration in (15, 25, 35):
        save(tmp_path, iteration, Retention(last=2))
    aside = {"iter_0000020.superseded", "iter_0000030.superseded"}
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000025", "iter_0000035", *aside}
    save(tmp_path, 20)
    save(tmp_path, 19)
    assert {path.name for path in tmp_path.glob("iter_*")} == {
        "iter_0000019", *aside, *(f"iter_00000{n}.superseded" for n in (25, 35)), "iter_0000020.superseded1",
    }
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000019"


def test_a_milestone_that_was_missed_is_made_up_for(tmp_path: Path) -> None:
    for iteration in (2, 5, 6, 8, 9, 13, 14):
        save(tmp_path, iteration, Retention(last=1, every=4))
    assert {path.name for path in tmp_path.glob("iter_*")} == {f"iter_{n:07d}" for n in (5, 8, 13, 14)}


def test_what_cannot_be_removed_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a file that is in use keeps its folder."""
    original = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return
        raise OSError(errno.EBUSY, "in use", str(path))

    save(tmp_path, 10)
    monkeypatch.setattr(shutil, "rmtree", busy)
    for iteration in (20, 30):
        save(tmp_path, iteration, Retention(last=1))
    monkeypatch.setattr(shutil, "rmtree", original)
    assert {path.name for path in tmp_path.glob("*iter_*")} == {
        "iter_0000030", ".iter_0000010.deleted", ".iter_0000020.deleted"
    }
    save(tmp_path, 40)
    assert {path.name for path in tmp_path.glob("*iter_*")} == {"iter_0000030", "iter_0000040"}


def test_nothing_is_deleted_where_the_save_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    monkeypatch.setattr("megatron_flashi2v.checkpoint.saving.write_tracker", fail)
    with pytest.raises(StorageError):
        save(tmp_path, 20, Retention(last=1))
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000010"


def fail(*arguments: object) -> None:
    raise OSError(28, "No space left on device", "somewhere")


def one_of_two(rank: int, folder: Path) -> None:
    """Both ranks read half of the files, and what one of them finds holds for both."""
    dist.init_process_group("gloo")
    read: list[str] = []
    original = manifest.sha256_of
    manifest.sha256_of = lambda path: read.append(path.name) or original(path)  # type: ignore[assignment]
    assert find_checkpoint(folder / "run", peers=Peers(rank, 2)) == folder / "run" / "iter_0000010"
    # Of the damaged checkpoint, then of the good one.
    assert len([name for name in read if name.startswith("tensors-")]) == 2
    try:
        find_checkpoint(folder / "run" / "iter_0000020", peers=Peers(rank, 2))
    except CheckpointError as error:
        assert "of 2; 1 failed" in str(error), error
    else:
        raise AssertionError("the damage was not noticed")
    shutdown()


def test_ranks_agree_on_the_checkpoint(tmp_path: Path) -> None:
    folder = None
    for iteration in (10, 20):
        folder = save_halves(tmp_path / "run", iteration)
    assert folder is not None
    flip(folder / "tensors-00001-of-00002.safetensors", -1)
    run_ranks(one_of_two, 2, tmp_path, tmp_path)


def save_halves(root: Path, iteration: int) -> Path:
    """A checkpoint of two files of tensors, as two ranks write it."""
    run_ranks(write_half, 2, root.parent, root, iteration)
    return root / f"iter_{iteration:07d}"


def write_half(rank: int, root: Path, iteration: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    tensors = [
        TensorPiece.whole(f"model.{name}", torch.zeros(shape)) for name, shape in parameter_shapes(ODD).items()
    ]
    save_checkpoint(root, iteration, pieces=tensors[rank::2], model_config=ODD, state={}, rank=rank, world_size=2)
    shutdown()
