"""Decoding in another process: the same frames, and crashes and hangs that cost one clip."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_video

from megatron_flashi2v.config.clips import ClipSettings, FilterSettings
from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.annotations import Entry, parse_entry
from megatron_flashi2v.data.clips import Frames, load_frames
from megatron_flashi2v.data.decoder import Decoder
from megatron_flashi2v.data.reasons import Drop

SETTINGS = ClipSettings(
    wanted=FilterSettings(num_frames=5, height=16, width=24, fps=16.0, min_pixels=0, too_long_factor=50.0),
)
SEED = 3
LIMIT_S = 6.0
EARLIER: set[int] = set()

# Loaded by each new Python process: files of these names are what they are called.
TRAPS = """
import ctypes, os
import av
whole = av.open
def opened(file, *args, **options):
    if "segfault" in str(file):
        ctypes.string_at(0)
    if "exit" in str(file):
        os._exit(7)
    if "hang" in str(file):
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock, as a hanging C library may
    return whole(file, *args, **options)
av.open = opened
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a.mkv", "segfault.mkv", "exit.mkv", "hang.mkv"):
        make_video(folder / name, 30, 40, 56)
    (folder / "text.mkv").write_text("no video")
    return folder


def entries_of(folder: Path, *names: str) -> list[Entry]:
    raw = [{"path": name, "cap": ["x"], "cut": [n, n + 20], "crop": [0, 48, 0, 40]} for n, name in enumerate(names)]
    entries = [parse_entry(one, root=folder, index=n, source=f"meta {n}") for n, one in enumerate(raw)]
    assert all(isinstance(entry, Entry) for entry in entries)
    return entries  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def earlier() -> Iterator[None]:
    """Decoders that other tests' failed runs have not let go of yet do not count."""
    EARLIER.clear()
    EARLIER.update(processes())
    yield


def processes() -> list[int]:
    """Decoders that a test has started and that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and b"decoder_process" in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
        except OSError:
            pass
    return [process for process in found if process not in EARLIER]


def test_the_frames_are_the_same_and_in_order(videos: Path) -> None:
    entries = entries_of(videos, *["a.mkv"] * 5, "text.mkv", "absent.mkv", "a.mkv")
    expected = [load_frames(entry, SETTINGS, SEED) for entry in entries]
    decoder = Decoder(SETTINGS, SEED, workers=2, limit_s=120)
    for _ in range(2):  # the processes go on from one list to the next
        found = list(decoder.decode(entries))
        assert len(processes()) == 2
        for one, want in zip(found, expected, strict=True):
            assert type(one) is type(want)
            if isinstance(want, Frames):
                assert torch.equal(one.frames_TCHW, want.frames_TCHW)
                assert (one.indices, one.facts) == (want.indices, want.facts)
            else:
                assert one == want
    decoder.close()
    assert not processes()


def test_crashes_and_hangs_cost_one_clip(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(TRAPS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    entries = entries_of(videos, "a.mkv", "segfault.mkv", "a.mkv", "hang.mkv", "a.mkv", "exit.mkv", "a.mkv")
    decoder = Decoder(SETTINGS, SEED, workers=1, limit_s=LIMIT_S)
    found = list(decoder.decode(entries))
    kinds = [one.reason if isinstance(one, Drop) else "frames" for one in found]
    assert kinds == ["frames", "decoder_crash", "frames", "decoder_hang", "frames", "decoder_crash", "frames"]
    details = [one.detail for one in found if isinstance(one, Drop)]
    assert "segfault.mkv" in details[0] and "SIGSEGV" in details[0]
    assert "hang.mkv" in details[1] and f"more than {LIMIT_S:g} s" in details[1]
    assert "exit.mkv" in details[2] and "exit code 7" in details[2]
    decoder.close()
    assert not processes()


def test_time_that_the_taker_spends_is_not_the_decoders(videos: Path) -> None:
    decoder = Decoder(SETTINGS, SEED, workers=1, limit_s=4.0)
    kinds = []
    for one in decoder.decode(entries_of(videos, *["a.mkv"] * 2)):
        kinds.append(type(one))
        time.sleep(5)
    decoder.close()
    assert kinds == [Frames] * 2


def test_leaving_early_leaves_nothing_behind(videos: Path) -> None:
    entries = entries_of(videos, *["a.mkv"] * 4)
    decoder = Decoder(SETTINGS, SEED, workers=1, limit_s=120)
    clips = decoder.decode(entries)
    next(clips)
    clips.close()
    again = list(decoder.decode(entries[2:]))
    assert [one.indices for one in again] == [load_frames(entry, SETTINGS, SEED).indices for entry in entries[2:]]
    decoder.close()
    assert not processes()


def test_a_process_that_cannot_start_is_an_error(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DataError, match=r"did not start \(exit code 3\).*--decode-workers 0"):
        list(Decoder(SETTINGS, SEED, workers=1, limit_s=5).decode(entries_of(videos, "a.mkv")))
