"""Folders that are there whole or not at all, whatever fails while they are published."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.runtime.publishing import publish_folder, staged_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flush finds the disk full, as late as a real file system may."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def test_staged_folder_appears_when_whole(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "iter_0000010"
    with staged_folder(final) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(b"1234")
        assert not final.exists()
    assert (final / "deep" / "weights").read_bytes() == b"1234"
    assert names(final.parent) == ["iter_0000010"]


def test_staged_folder_leaves_nothing_on_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "export") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_staged_folder_passes_other_errors_of_the_body(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "export"):
        open(tmp_path / "input.mp4").close()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_in_the_body_is_named(tmp_path: Path, error: Exception) -> None:
    final = tmp_path / "export"
    with pytest.raises(UserError, match=f"{final}: the disk is full"), staged_folder(final):
        raise error
    with pytest.raises(UserError, match="the disk is full"), staged_folder(final):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("worker failed") from cause
    assert names(tmp_path) == []


def test_full_disk_at_the_last_flush(tmp_path: Path, full_disk: None) -> None:
    with (
        pytest.raises(UserError, match="the disk is full"),
        staged_folder(tmp_path / "export", overwrite=True) as folder,
    ):
        (folder / "weights").write_text("new")
    assert names(tmp_path) == []


def test_existing_folder_is_refused_before_work_begins(tmp_path: Path) -> None:
    final = tmp_path / "export"
    final.mkdir()
    with staged_folder(final) as folder:  # empty: nothing to lose
        (folder / "weights").write_text("old")
    began = False
    with pytest.raises(UserError, match=f"{final}: the folder exists"), staged_folder(final):
        began = True
    assert not began
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: a file is in the way"), staged_folder(tmp_path / "file"):
        pass


def test_overwrite_swaps_whole_folders(tmp_path: Path) -> None:
    final = tmp_path / "export"
    for text in ("old", "new"):
        with staged_folder(final, overwrite=True) as folder:
            (folder / text).write_text(text)
    assert names(final) == ["new"]
    with pytest.raises(ValueError), staged_folder(final, overwrite=True) as folder:
        (folder / "newer").write_text("")
        raise ValueError
    assert names(final) == ["new"] and names(tmp_path) == ["export"]


@pytest.mark.parametrize("name", ["n" * 248, "視" * 85])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    for text in ("old", "new"):
        with staged_folder(tmp_path / name, overwrite=True) as folder:
            (folder / "a").write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name / "a").read_text() == "new"


def test_killed_runs_leftovers_are_cleared(tmp_path: Path) -> None:
    final = tmp_path / "export"
    (tmp_path / ".export.partial").mkdir()
    (tmp_path / ".export.partial" / "half").write_text("")
    (tmp_path / ".export.previous").mkdir()  # killed between the two renames of a swap
    (tmp_path / ".export.previous" / "old").write_text("")
    with pytest.raises(UserError, match="exists"), staged_folder(final):
        pass
    assert names(final) == ["old"]
    with staged_folder(final, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert names(final) == ["new"] and names(tmp_path) == ["export"]


def test_failing_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "export"
    with staged_folder(final) as folder:
        (folder / "old").write_text("")
    rename = os.rename

    def fail(path: Path, target: Path) -> None:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "I/O error")
        rename(path, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="cannot be written"), staged_folder(final, overwrite=True):
        pass
    assert names(final) == ["old"] and names(tmp_path) == ["export"]


def folders(root: Path) -> tuple[Path, Path, Path]:
    """A whole folder to publish, an older one in its place, and where that is to wait."""
    partial, final = root / ".a.partial", root / "a"
    for folder, name in ((partial, "new"), (final, "old")):
        folder.mkdir()
        (folder / name).touch()
    return partial, final, root / ".a.previous"


@pytest.mark.parametrize("moment", ["aside", "rename", "flush", "commit"])
@pytest.mark.parametrize("replaces", [True, False])
def test_a_failing_publication_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, replaces: bool
) -> None:
    partial, final, aside = folders(tmp_path)
    if not replaces:
        shutil.rmtree(final)
    before = {path: names(path) for path in tmp_path.iterdir()}
    calls: list[str] = []

    def failing(*arguments: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    def commit() -> None:
        calls.append("commit")
        assert names(final) == ["new"]
        if moment == "commit":
            failing()

    rename = os.rename
    if moment == "flush":
        monkeypatch.setattr(os, "fsync", failing)
    elif moment != "commit":
        chosen = final if moment == "aside" else partial
        monkeypatch.setattr(os, "rename", lambda path, to: failing() if path == chosen else rename(path, to))
    if moment == "aside" and not replaces:  # nothing is renamed but the new folder
        publish_folder(partial, final, aside=aside, commit=commit)
        assert names(tmp_path) == ["a"]
        return
    with pytest.raises(OSError, match="I/O error"):
        publish_folder(partial, final, aside=aside, commit=commit)
    assert {path: names(path) for path in tmp_path.iterdir()} == before
    assert calls == (["commit"] if moment == "commit" else [])


def test_the_name_is_on_the_disk_before_what_refers_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, final, aside = folders(tmp_path)
    order: list[str] = []
    rename, fsync = os.rename, os.fsync
    monkeypatch.setattr(os, "rename", lambda path, to: order.append(f"{path.name} -> {to.name}") or rename(path, to))
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("flush") or fsync(descriptor))
    publish_folder(partial, final, aside=aside, commit=lambda: order.append("commit"))
    assert order == ["a -> .a.previous", ".a.partial -> a", "flush", "commit"]
    assert names(tmp_path) == ["a"] and names(final) == ["new"]
