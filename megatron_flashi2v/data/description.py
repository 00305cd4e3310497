"""``dataset.json`` and the empty prompt's rows, stored once per prepared data set and written last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megatron_flashi2v.config.clips import Interpolation
from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.shards import SHARD_PATTERN, ShardIndex, shard_name
from megatron_flashi2v.runtime.files import atomic_write_bytes, atomic_write_json, read_json_object

DATASET_FORMAT = "megatron_flashi2v-dataset"
DATASET_VERSION, WITH_INPUTS_VERSION = 1, 2
"""The latter's samples hold further tensors, see :attr:`DataInfo.inputs`."""
DATASET_FILE = "dataset.json"
EMPTY_TEXT_FILE = "empty_text.safetensors"


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """Properties common to all samples of a prepared data set.

    Attributes:
        latent_shape: (C, T, H, W) of one sample's latents; T counts latent frames.
        text_dim: width of a text row.
        text_length: most rows that a caption may have; shorter ones are padded with zero rows when loaded.
        text_cleaning: how captions were cleaned before tokenising, "full" or "light"; sampling must do the same.
        fps: frames per second of the clips.
        frames: video frames of one clip.
        height: pixels.
        width: pixels.
        interpolation: of resized frames; a set's settings have it, and not its description.
        vae: settings of the VAE that made the latents, JSON-ready.
        text_encoder: settings of the text encoder that made the rows, JSON-ready.
        inputs: shapes of the tensors that each sample holds beside latents and text, for the paradigms that take them
            (``ImageConditioning.stored_inputs``), by name.
        image_encoder: settings of the image encoder that made some of them, JSON-ready.
    """

    latent_shape: tuple[int, int, int, int]
    text_dim: int
    text_length: int
    text_cleaning: str
    fps: float
    frames: int
    height: int
    width: int
    interpolation: Interpolation = "bicubic"
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    image_encoder: dict[str, Any] = field(default_factory=dict)

    @property
    def temporal_stride(self) -> int | None:
        """Video frames for each latent frame after the first; None where there is only the first."""
        latent_frames = self.latent_shape[1]
        return None if latent_frames == 1 else (self.frames - 1) // (latent_frames - 1)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; what earlier versions did not have is left out where it is empty."""
        values = {**asdict(self), "latent_shape": list(self.latent_shape)}
        values["inputs"] = {name: list(shape) for name, shape in self.inputs.items()}
        del values["interpolation"]
        return {name: value for name, value in values.items() if value or name not in ("inputs", "image_encoder")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DataInfo:
        """The reverse of :meth:`to_json`; malformed values raise KeyError, TypeError or ValueError."""
        channels, frames, height, width = (int(size) for size in values["latent_shape"])
        inputs = {name: tuple(map(int, shape)) for name, shape in values.get("inputs", {}).items()}
        return cls(**{**values, "latent_shape": (channels, frames, height, width), "inputs": inputs})


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One line of the data set's list of shards: name, samples in it, bytes of its tar."""

    name: str
    samples: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """Contents of ``dataset.json``.

    Attributes:
        info: what all samples have in common.
        settings: everything that decided the samples' bytes, JSON-ready.
        fingerprint: hash of the settings; equal to that in every shard's index.
        shards: in order; the samples are numbered through them.
    """

    info: DataInfo
    settings: dict[str, Any]
    fingerprint: str
    shards: tuple[ShardEntry, ...]


def shard_entry(index: ShardIndex) -> ShardEntry:
    """A shard's line in the data set's list."""
    return ShardEntry(name=shard_name(index.number), samples=len(index.samples), bytes=index.tar_bytes)


def write_description(
    folder: Path,
    *,
    info: DataInfo,
    settings: dict[str, Any],
    fingerprint: str,
    indices: Sequence[ShardIndex],
    empty_text_rows_LD: torch.Tensor,
) -> DatasetDescription:
    """Write the empty prompt's rows and then ``dataset.json``, which makes the data set whole.

    Args:
        folder: the data set's folder.
        info: what all samples have in common.
        settings: everything that decided the samples' bytes.
        fingerprint: hash of the settings.
        indices: of all shards, in order.
        empty_text_rows_LD: rows of the empty prompt, bf16.
    """
    shards = tuple(map(shard_entry, indices))
    rows = {"text": empty_text_rows_LD.contiguous()}
    atomic_write_bytes(folder / EMPTY_TEXT_FILE, safetensors.torch.save(rows))
    values = {
        "format": DATASET_FORMAT,
        "version": WITH_INPUTS_VERSION if info.inputs else DATASET_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "fingerprint": fingerprint,
        "info": info.to_json(),
        "settings": settings,
        "shards": [asdict(shard) for shard in shards],
    }
    atomic_write_json(folder / DATASET_FILE, values)
    return DatasetDescription(info=info, settings=settings, fingerprint=fingerprint, shards=shards)


def read_description(folder: Path) -> DatasetDescription:
    """Read ``dataset.json``.

    Raises:
        DataError: the folder or the file is missing, malformed, or of another version.
    """
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist; make it with `flashi2v prepare --output {folder}`")
    path = folder / DATASET_FILE
    if not path.is_file():
        raise DataError(
            f"{path} is missing: {folder} holds no finished data set; finish it with `flashi2v prepare`"
        )
    values = read_json_object(path, error=DataError)
    if values.get("format") != DATASET_FORMAT:
        raise DataError(f"{path}: not a data set's description (its format must be {DATASET_FORMAT!r})")
    known = (DATASET_VERSION, WITH_INPUTS_VERSION)
    if values.get("version") not in known:
        raise DataError(
            f"{path}: version {values.get('version')!r}; this program reads {' and '.join(map(str, known))}"
        )
    try:
        description = DatasetDescription(
            info=DataInfo.from_json(
                {**values["info"], "interpolation": values["settings"].get("interpolation", "bicubic")}
            ),
            settings=dict(values["settings"]),
            fingerprint=str(values["fingerprint"]),
            shards=tuple(ShardEntry(**row) for row in values["shards"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: malformed ({type(error).__name__}: {error}); prepare the data again") from error
    for shard in description.shards:
        if not SHARD_PATTERN.fullmatch(shard.name):
            raise DataError(f"{path}: shard name {shard.name!r} is malformed; prepare the data again")
    return description
