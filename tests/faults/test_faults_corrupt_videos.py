"""A corpus of corrupt and odd videos through ``flashi2v prepare``: a sample or a named reason each, and no crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from helpers.odd_videos import BT2020, ICTCP, LIMITED, PQ, write_video
from helpers.tiny_models import frame_pattern, make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae, make_video
from PIL import Image

from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.data.reasons import ERROR_REASONS

HEIGHT, WIDTH, FRAMES = 40, 56, 24
DAMAGE = ERROR_REASONS.keys() - {"decoder_crash", "decoder_hang"}


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        for number in range(5):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def huge_picture(path: Path, side: int) -> None:
    """The header claims ``side`` x ``side`` pixels."""
    data = make_video(path, 4, HEIGHT, WIDTH, codec="rawvideo").read_bytes()
    size = WIDTH.to_bytes(4, "little") + HEIGHT.to_bytes(4, "little")
    assert size in data
    path.write_bytes(data.replace(size, side.to_bytes(4, "little") * 2))


def huge_count(path: Path) -> None:
    """The header claims two thousand million frames."""
    data = bytearray(make_video(path, FRAMES, HEIGHT, WIDTH).read_bytes())
    place = data.index(b"stsz") + 12
    data[place : place + 4] = (2**31 - 2).to_bytes(4, "big")
    path.write_bytes(data)


def flipped(path: Path) -> None:
    data = bytearray(make_video(path, FRAMES, HEIGHT, WIDTH).read_bytes())
    for place in np.random.default_rng(0).integers(200, len(data), 60):
        data[place] ^= 0xFF
    path.write_bytes(data)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def half(path: Path) -> None:
    data = make_video(path, FRAMES, HEIGHT, WIDTH).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def odd(path: Path, **options: Any) -> None:
    frames = [frame_pattern(number, HEIGHT, WIDTH) for number in range(FRAMES)]
    write_video(path, frames, **{"rate": 16, "pix_fmt": "yuv420p"} | options)


def transparent(path: Path) -> None:
    frames = [np.dstack([frame_pattern(n, HEIGHT, WIDTH), np.full((HEIGHT, WIDTH), 9 * n)]) for n in range(FRAMES)]
    write_video(path, [frame.astype(np.uint8) for frame in frames], codec="libvpx-vp9", pix_fmt="yuva420p", rate=16)


def titled_in_gbk(path: Path) -> None:
    odd(path, codec="libx264", metadata={"title": "TITLE123"})
    path.write_bytes(path.read_bytes().replace(b"TITLE123", "你好世界".encode("gbk")))


HDR = {"colorspace": BT2020, "color_trc": PQ, "color_primaries": BT2020, "color_range": LIMITED}
MIRROR = (-(2**16), 0, 0, 0, 2**16, 0, 0, 0, 2**30)
UNEVEN = [100 * n for n in range(8)] + [800 + 50 * n for n in range(16)]

# File: how it is made, and what may become of it.
CORPUS = {
    "anamorphic.mp4": (lambda path: odd(path, codec="libx264", pixel_aspect=Fraction(5, 3)), {"sample"}),
    "mirrored.mp4": (lambda path: odd(path, codec="libx264", matrix=MIRROR), {"sample"}),
    "hdr.mkv": (lambda path: odd(path, pix_fmt="yuv420p10le", tags=HDR), {"sample"}),
    "ictcp.mkv": (
        lambda path: odd(path, pix_fmt="yuv420p10le", tags=HDR | {"colorspace": ICTCP}), {"unsupported_picture"}
    ),
    "transparent.webm": (transparent, {"sample"}),
    "preview.mkv": (lambda path: odd(path, preview=(8, 12)), {"sample"}),
    "gbk.mp4": (titled_in_gbk, {"sample"}),
    "uneven.mkv": (lambda path: odd(path, stamps=UNEVEN, time_base=Fraction(1, 1000)), {"sample"}),
    "thousand.mkv": (
        lambda path: odd(path, rate=1000, stamps=range(0, 40 * FRAMES, 40), time_base=Fraction(1, 1000)), {"sample"}
    ),
    "grey.mkv": (lambda path: odd(path, pix_fmt="gray", tags={"color_range": LIMITED}), {"sample"}),
    "picture.png": (lambda path: Image.fromarray(frame_pattern(0, HEIGHT, WIDTH)).save(path), {"too_short"}),
    "good.mp4": (lambda path: make_video(path, FRAMES, HEIGHT, WIDTH), {"sample"}),
    "odd.mkv": (lambda path: make_video(path, FRAMES, 41, 57, codec="ffv1"), {"sample"}),
    "variable.mkv": (lambda path: make_video(path, FRAMES, HEIGHT, WIDTH, gaps=(3, 7, 8)), {"sample"}),
    "rotated.mp4": (lambda path: make_video(path, FRAMES, WIDTH, HEIGHT, rotation=90), {"sample"}),
    "truncated.mp4": (half, {"unreadable"}),
    "truncated.mkv": (half, {"truncated", "too_short", "sample"}),
    "empty.mp4": (lambda path: write(path, b""), {"unreadable"}),
    "zeros.mp4": (lambda path: write(path, bytes(100_000)), {"unreadable"}),
    "text.mp4": (lambda path: write(path, b"hello world\n" * 400), {"unreadable"}),
    "playlist.mp4": (lambda path: write(path, b"#EXTM3U\n#EXTINF:3,\ngood.mp4\n#EXT-X-ENDLIST\n"), {"unreadable"}),
    "audio.mp4": (audio_only, {"no_video_stream"}),
    "single.mp4": (lambda path: make_video(path, 1, HEIGHT, WIDTH), {"too_short", "no_fps", "fps_too_low"}),
    "huge.avi": (lambda path: huge_picture(path, 10_000), {"too_large"}),
    "absurd.avi": (lambda path: huge_picture(path, 30_000), {"too_large", "unreadable", "no_frames"}),
    "count.mp4": (huge_count, {"unreadable", "no_frames", "no_fps", "undecodable", "sample"}),
    "flipped.mkv": (flipped, {*DAMAGE, "too_short", "fps_too_low", "sample"}),
    "absent.mp4": (lambda path: None, {"missing_file"}),
    "folder.mp4": (lambda path: path.mkdir(), {"missing_file"}),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    root = tmp_path_factory.mktemp("corpus")
    for name, (make, _) in CORPUS.items():
        make(root / name)
    entries = [{"path": name, "cap": f"a dog {name}"} for name in CORPUS]
    (root / "meta.json").write_text(json.dumps(entries))
    flags = ["--annotations", root / "meta.json", "--output", root / "data", "--vae", make_tiny_vae(root / "vae")]
    flags += ["--text-encoder", make_tiny_text_encoder(root / "text_encoder"), "--text-length", 6, "--device", "cpu"]
    flags += ["--tokenizer", make_tiny_tokenizer(root / "tokenizer"), "--num-frames", 5, "--height", 16, "--width", 24]
    flags += ["--samples-per-shard", 4, "--too-long-factor", 20, "--min-aspect", 0.3, "--max-aspect", 3]
    command = [sys.executable, "-m", "megatron_flashi2v", "prepare", *flags, "--decode-workers", 2]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=500, check=False, env=dict(os.environ)
    )
    return root / "data", done


@pytest.fixture(scope="module")
def outcomes(prepared: tuple[Path, subprocess.CompletedProcess]) -> dict[str, str]:
    folder, done = prepared
    assert done.returncode == 0, done.stderr
    data = PreparedDataset(folder)
    found = {data.record(index)["source"]: "sample" for index in range(len(data))}
    rows = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert not found.keys() & {row["path"] for row in rows}
    return {**found, **{row["path"]: row["reason"] for row in rows}}


def test_every_file_ends_in_a_sample_or_a_reason(outcomes: dict[str, str]) -> None:
    assert outcomes.keys() == CORPUS.keys()


@pytest.mark.parametrize("name", CORPUS)
def test_what_became_of_it(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] in CORPUS[name][1]


def test_nothing_crashed_and_all_samples_are_sound(prepared: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, done = prepared
    assert "Traceback" not in done.stderr and "decoder_crash" not in done.stderr
    data = PreparedDataset(folder)
    for index in range(len(data)):
        assert torch.isfinite(data[index].latents_CTHW).all()  # reading checks shapes and widths too


def test_the_report_shows_them(prepared: tuple[Path, subprocess.CompletedProcess], outcomes: dict[str, str]) -> None:
    page = (prepared[0] / "report.html").read_text()
    samples = [name for name, outcome in outcomes.items() if outcome == "sample"]
    assert page.count("<figure><img") == len(samples) and all(f"{name}, frame " in page for name in samples)
    reasons = {outcome for outcome in outcomes.values() if outcome != "sample"}
    assert all(f"dropped: {reason}" in page for reason in reasons)
    assert "src=\"http" not in page and page.count("data:image/png") == 1
