"""Videos, annotations and encoders whose samples fit the ``tiny`` model."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae, make_video

CAPTIONS = ("a red car drives through the street", "a person walks", "the dog runs", "a blue car in the street")


def make_corpus(folder: Path, clips: int = 6, *, z_dim: int = 16, text_dim: int = 64) -> list[str]:
    """Write ``clips`` annotations of two videos, and the encoders; the flags that `prepare` and `train` share."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_vae(folder / "vae", z_dim=z_dim)
    make_tiny_text_encoder(folder / "text_encoder", text_dim=text_dim)
    make_tiny_tokenizer(folder / "tokenizer")
    for name in ("one.mkv", "two.mkv"):
        make_video(folder / name, 40, 40, 56)
    entries = [
        {"path": ("one.mkv", "two.mkv")[n % 2], "cap": [CAPTIONS[n % 4], CAPTIONS[(n + 1) % 4]], "cut": [n, n + 20]}
        for n in range(clips)
    ]
    (folder / "meta.json").write_text(json.dumps(entries))
    return [
        "--annotations", str(folder / "meta.json"), "--vae", str(folder / "vae"),
        "--text-encoder", str(folder / "text_encoder"), "--tokenizer", str(folder / "tokenizer"),
        "--num-frames", "5", "--height", "16", "--width", "24", "--text-length", "32", "--device", "cpu",
        "--decode-workers", "0",
    ]
