"""Spoil single samples of a prepared data set, so that its shards' sizes and indices still agree."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch


def locate(folder: Path, number: int) -> tuple[Path, dict, int]:
    """The tar of sample ``number``, its shard's index, and the sample's place in the shard."""
    for path in sorted((folder / "shards").glob("shard-*.json")):
        index = json.loads(path.read_text())
        if number < len(index["samples"]):
            return path.with_suffix(".tar"), index, number
        number -= len(index["samples"])
    raise IndexError(number)


def spoil_bytes(folder: Path, number: int) -> str:
    """Flip a byte of the sample's tensors; the sample's key."""
    tar, index, place = locate(folder, number)
    member = index["samples"][place]["tensors"]
    with tar.open("r+b") as file:
        file.seek(member["offset"] + member["size"] - 3)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))
    return index["samples"][place]["key"]


def spoil_values(folder: Path, number: int, change: Callable[[torch.Tensor], torch.Tensor | bytes]) -> str:
    """Change the sample's latents, or its file, as a faulty writer would: with checksums that fit; its key."""
    tar, index, place = locate(folder, number)
    member = index["samples"][place]["tensors"]
    with tar.open("r+b") as file:
        file.seek(member["offset"])
        tensors = safetensors.torch.load(file.read(member["size"]))
        latents = change(tensors["latents"])
        data = latents
        if isinstance(latents, torch.Tensor):
            data = safetensors.torch.save({**tensors, "latents": latents})
        assert len(data) <= member["size"]
        file.seek(member["offset"])
        file.write(data)
    member.update(size=len(data), crc32=zlib.crc32(data))
    tar.with_suffix(".json").write_text(json.dumps(index))
    return index["samples"][place]["key"]
