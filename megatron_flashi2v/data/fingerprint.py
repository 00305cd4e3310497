"""Hashes the settings that decide the bytes of a prepared data set; a later run keeps shards of the same hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.clips import given
from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.reasons import DroppedEntry
from megatron_flashi2v.encoders.folders import model_folder, require_files
from megatron_flashi2v.encoders.image import PROCESSOR_FILE, processor_folder

PIPELINE_VERSION = 2
"""To be raised whenever the same inputs would give other samples."""

WHOLE_FILE_BYTES = 16 * 2**20
SAMPLED_BLOCKS = 16
BLOCK_BYTES = 2**18

LATER_FIELDS: dict[str, Any] = {"frame_picking": "index", "picture": "stored", "vae_dtype": "float32",
                                "grey_clip": False}
"""Fields that older versions did not have, each with the value that means what those did. A field at that value is left
out of the settings, so that data prepared by an older version stay whole; a new field gets a line here."""


def data_settings(
    config: EncodingConfig, entries: Sequence[Entry], malformed: Sequence[DroppedEntry]
) -> dict[str, Any]:
    """Return all settings that decide the samples, JSON-ready; neither paths nor devices are among them.

    Args:
        config: checked.
        entries: the well-formed annotations.
        malformed: the others.
    """
    return {
        **encoding_settings(config),
        "entries": len(entries) + len(malformed),
        "annotations": _annotations_hash(entries, malformed),
    }


def encoding_settings(config: EncodingConfig) -> dict[str, Any]:
    """Return the settings that decide a sample besides its annotation, JSON-ready."""
    sources, clips = config.arguments.sources, config.arguments.clips
    image = {} if sources.image_encoder is None else {"image_encoder": _image_encoder_hash(sources.image_encoder)}
    values = {**flat_values(clips), **flat_values(config.arguments.captions)}
    return {
        "pipeline_version": PIPELINE_VERSION,
        **{name: value for name, value in values.items() if name not in LATER_FIELDS or value != LATER_FIELDS[name]},
        "text_length": config.text_length,
        "seed": config.seed,
        "min_pixels": clips.wanted.pixel_floor,
        "vae": folder_hash(given(sources.vae, "--vae"), "VAE"),
        "text_encoder": folder_hash(given(sources.text_encoder, "--text-encoder"), "text encoder"),
        "tokenizer": folder_hash(given(sources.tokenizer, "--tokenizer"), "tokenizer"),
        **image,
    }


def settings_hash(settings: dict[str, Any]) -> str:
    """Hash of :func:`data_settings`."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def folder_hash(folder: Path, what: str) -> str:
    """Hash of a model folder: names, sizes and contents of its files.

    Of files beyond :data:`WHOLE_FILE_BYTES` evenly spaced blocks are read: retrained weights differ everywhere, and
    a text encoder of 20 GB is not read in full each time.

    Raises:
        ConfigError: the folder is missing.
    """
    folder = model_folder(folder, what)
    require_files(folder, what)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(os.fsencode(f"{name.as_posix()}\0{path.stat().st_size}\0"))
            _update_with_file(digest, path)
    return digest.hexdigest()


def _image_encoder_hash(place: Path) -> str:
    """Hash of the encoder and of what its processor does."""
    weights = folder_hash(place, "image encoder")  # first: it tells of a folder that is not there
    processor = (processor_folder(model_folder(place, "image encoder")) / PROCESSOR_FILE).read_bytes()
    return hashlib.sha256(weights.encode() + processor).hexdigest()


def _update_with_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            digest.update(file.read())
            return
        for block in range(SAMPLED_BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))


def _annotations_hash(entries: Sequence[Entry], malformed: Sequence[DroppedEntry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        values = [getattr(entry, name) for name in Entry.__slots__ if name not in ("root", "source")]
        digest.update(json.dumps(values).encode() + b"\n")
    for dropped in malformed:
        digest.update(json.dumps([dropped.entry, dropped.reason]).encode() + b"\n")
    return digest.hexdigest()
