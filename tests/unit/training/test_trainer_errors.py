"""What a user can get wrong: one line that names it, an exit code that is not 0, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.layouts import metrics
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.checkpoint.manifest import write_manifest

Train = Callable[..., int]
TRACKER = "latest_checkpointed_iteration.txt"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that the command ended with; log lines may stand before it."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text[text.index("flashi2v train: error: ") :]


def assert_refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    line = error_line(capsys)
    assert line.count("\n") == 1 and all(word in line for word in words), line


@pytest.fixture
def saved(train: Train, tmp_path: Path) -> Path:
    """A run of two iterations."""
    assert train("--save", tmp_path / "saved", "--train-iters", 2) == 0
    return tmp_path / "saved"


@pytest.mark.parametrize("flags, words", [
    (("--num-layers", 4, "--ffn-hidden-size", 64), ("num_layers is 2", "4 was asked", "ffn_hidden_size is 48", "64")),
    (("--num-attention-heads", 4), ("num_attention_heads is 2", "4 was asked for")),
    (("--conditioning", "text_to_video"), ("conditioning is flashi2v", "text_to_video was asked for")),
    (("--phi-order", "repeat_then_conv"), ("phi_order is conv_then_broadcast", "repeat_then_conv was asked for")),
])
def test_checkpoint_of_another_model_is_refused(
    train: Train, saved: Path, capsys: pytest.CaptureFixture[str], flags: tuple, words: tuple[str, ...]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    capsys.readouterr()
    assert train("--save", saved, "--load", saved, *flags) == 1
    assert_refused(capsys, str(saved / "iter_0000002"), *words)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before


def test_damaged_checkpoint_is_refused(train: Train, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    largest = max((saved / "iter_0000002").iterdir(), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    capsys.readouterr()
    assert train("--save", saved, "--load", saved) == 1
    assert_refused(capsys, str(largest))


@pytest.mark.parametrize("gone", ["iteration", "consumed_samples", "optimizer"])
def test_checkpoint_whose_state_lacks_an_entry(
    train: Train, saved: Path, capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    path = saved / "iter_0000002" / "state.json"
    state = json.loads(path.read_text())
    del state[gone]
    path.write_text(json.dumps(state))
    write_manifest(path.parent, ["model_config.json", "state.json"])  # whole as far as hashes tell
    capsys.readouterr()
    assert train("--load", saved) == 1
    assert_refused(capsys, f"{path} has no {gone}")


def test_checkpoint_that_was_altered(train: Train, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved / "iter_0000002" / "state.json"
    path.write_text(path.read_text() + " ")
    capsys.readouterr()
    assert train("--load", saved) == 1
    assert_refused(capsys, f"{path} is damaged", "manifest.json")


def test_save_that_cannot_be_written(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert train("--save", tmp_path / "file" / "run") == 1
    assert_refused(capsys, str(tmp_path / "file" / "run"), "cannot be written")


def test_data_path_that_is_a_file(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert train("--data-path", tmp_path / "file") == 1
    assert_refused(capsys, f"--data-path {tmp_path / 'file'} is a file")


def test_no_data_path(run_command: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--device", "cpu") == 2
    assert_refused(capsys, "--data-path is not set", "flashi2v prepare")


def test_missing_data_folder(
    run_command: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("--device", "cpu", "--data-path", tmp_path / "nowhere", "--save", tmp_path / "run") == 1
    assert_refused(capsys, str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_truncated_shard(
    train: Train, synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(synthetic_data, tmp_path / "data")
    shard = sorted((tmp_path / "data").rglob("*.tar"))[-1]
    shard.write_bytes(shard.read_bytes()[:-512])
    assert train("--data-path", tmp_path / "data") == 1
    assert_refused(capsys, str(shard), "bytes")


@pytest.mark.parametrize("shape, text_dim, text_length, words", [
    ((5, 2, 4, 4), 8, 6, ("latent_channels is 4 in the model, but 5",)),
    ((4, 2, 4, 4), 9, 6, ("text_dim is 8 in the model, but 9",)),
    ((4, 2, 4, 4), 8, 7, ("text_length is 6", "--text-length 7")),
    ((4, 2, 5, 4), 8, 6, ("(2, 5, 4)", "patches of (1, 2, 2)")),
])
def test_data_of_other_widths(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...], text_dim: int,
    text_length: int, words: tuple[str, ...],
) -> None:
    write_synthetic(tmp_path / "data", 2, shape, text_dim, text_length, seed=1)
    assert train("--data-path", tmp_path / "data", "--save", tmp_path / "run") == 2
    assert_refused(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_indivisible_batch(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--global-batch-size", 3) == 2
    assert_refused(capsys, "--global-batch-size 3", "--micro-batch-size 2", "choose")


def test_unknown_attention_backend_lists_the_choices(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--attention-backend", "flash") == 2
    assert_refused(capsys, "--attention-backend flash", "torch_sdpa", "reference")


def test_a_full_disk_leaves_the_checkpoint_before(
    train: Train, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk runs full while iteration 4 is saved."""
    sync, checkpoint = os.fsync, saved / "iter_0000002"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    def full(descriptor: int) -> None:
        if (saved / ".iter_0000004.partial").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert train("--save", saved, "--load", saved) == 1
    assert_refused(capsys, "iter_0000004", "disk is full")
    assert not list(saved.glob("*iter_0000004*")) and (saved / TRACKER).read_text() == "2\n"
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before

    assert train("--save", saved, "--load", saved) == 0  # with room again it goes on from there
    assert train("--save", tmp_path / "straight") == 0
    assert [row["loss"] for row in metrics(saved)] == [row["loss"] for row in metrics(tmp_path / "straight")]
