"""Whole files or none, and errors that name them."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.runtime import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flush finds the disk full, as late as a real file system may."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def test_atomic_write_makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "value.json"
    files.atomic_write_json(path, {"lr": 0.1 + 0.2, "caption": "été"})
    files.atomic_write_json(path, {"lr": 1e-5, "caption": "été"})
    assert files.read_json(path) == {"lr": 1e-5, "caption": "été"}
    assert names(path.parent) == ["value.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask(), "the file has the user's usual permissions"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_full_disk_keeps_the_old_file(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "value.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=rf"{path}: the disk is full \(\d+ MiB free\)"):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["value.txt"]


def test_unwritable_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/value: cannot be written"):
        files.atomic_write_bytes(tmp_path / "file" / "value", b"")
    with pytest.raises(UserError, match="is a directory|cannot be written"):
        files.atomic_write_bytes(tmp_path, b"")


@pytest.mark.parametrize("name", ["n" * 248, "n" * 255, "é" * 127, "視" * 85], ids=["248", "255", "two", "three"])
def test_any_name_that_a_file_can_have_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for text in ("old", "new"):
        files.atomic_write_text(path, text)
    assert path.read_text() == "new" and names(tmp_path) == [name]


def test_names_beside_others() -> None:
    assert files.name_beside("run", ".", ".partial") == ".run.partial"
    long = [files.name_beside(f"{'視' * 84}{last}", ".", ".partial") for last in "abb"]
    assert long[0] != long[1] == long[2], "names that differ at their end stay apart"
    assert all(name.startswith(".視") and name.endswith(".partial") for name in long)
    assert all(200 < len(os.fsencode(name)) <= 255 for name in long)


def test_what_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files.require_writable(tmp_path / "new" / "report.json", "--report")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.json", "is no folder")):
        with pytest.raises(UserError, match=f"--report {path}.*{words}"):
            files.require_writable(path, "--report")
    assert names(tmp_path) == ["file"]


def test_read_json_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model_config.json"
    with pytest.raises(CheckpointError, match=f"{path}: there is no such file"):
        files.read_json(path, error=CheckpointError)
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(UserError, match=f"{path}: not valid JSON at line 2, column 7"):
        files.read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        files.read_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(tmp_path)


def test_jsonl_round_trip_keeps_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    rows = [{"iteration": 1, "loss": 0.1 + 0.2}, {"iteration": 2, "loss": 1 / 3, "note": "new\nline é\u2028"}]
    for row in rows:
        files.append_jsonl(path, row)
    assert files.read_jsonl(path) == rows


@pytest.mark.parametrize("torn", [b'{"iteration": 2, "lo', b'{"note": "\xc3', b"12", b"\0\0\0\0"])
def test_torn_last_line_is_dropped_and_overwritten(
    tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n' + torn)
    with caplog.at_level(logging.WARNING):
        assert files.read_jsonl(path) == [{"iteration": 1}]
    assert "line 2 is torn" in caplog.text
    files.append_jsonl(path, {"iteration": 2})
    assert path.read_bytes() == b'{"iteration": 1}\n{"iteration": 2}\n'


def test_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}')
    assert files.read_jsonl(path) == [{"iteration": 1}]
    files.append_jsonl(path, {"iteration": 2})
    assert files.read_jsonl(path) == [{"iteration": 1}, {"iteration": 2}]


def test_damage_elsewhere_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n\n{"iteration\n{"iteration": 3}\n')
    with pytest.raises(UserError, match=f"{path}: line 3 is not a JSON object"):
        files.read_jsonl(path)
    with pytest.raises(UserError, match="there is no such file"):
        files.read_jsonl(tmp_path / "none.jsonl")


def test_full_disk_takes_back_half_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    files.append_jsonl(path, {"iteration": 1})
    before = path.read_bytes()
    resource = pytest.importorskip("resource")
    import signal

    # A real limit of the file's size: the write stops half-way.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        with pytest.raises(UserError, match=f"{path}: "):
            files.append_jsonl(path, {"iteration": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before


def test_free_space_is_that_of_the_nearest_folder(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(UserError) as caught, files.full_disk_named(tmp_path / "not" / "there"):
        raise OSError(errno.ENOSPC, "No space left on device")
    stated = int(str(caught.value).split("(")[1].split()[0])
    assert abs(stated - shutil.disk_usage(tmp_path).free // 1024**2) < 500
