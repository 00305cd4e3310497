"""A folder written by ``flashi2v prepare``, read at random: latents, text rows and captions by sample index."""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.description import (
    DATASET_FILE,
    EMPTY_TEXT_FILE,
    DataInfo,
    ShardEntry,
    read_description,
)
from megatron_flashi2v.data.shards import (
    SHARD_FOLDER,
    IndexedSample,
    ShardIndex,
    TarReader,
    parse_tensors,
    read_index,
)

CACHED_INDICES = 256


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """One sample.

    Attributes:
        latents_CTHW: fp32, normalised posterior means of the clip; ``[:, :1]`` are those of the image condition.
        text_rows_LD: bf16, the caption's rows at their real length, L <= text_length.
        caption: the caption as it was tokenised.
        key: the sample's name in its shard.
        inputs: further tensors by name, those of :attr:`DataInfo.inputs`.
    """

    latents_CTHW: torch.Tensor
    text_rows_LD: torch.Tensor
    caption: str
    key: str
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, as they are stored, by name."""
        return {"latents": self.latents_CTHW, "text": self.text_rows_LD, **self.inputs}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor], caption: str, key: str) -> PreparedSample:
        """The reverse of :attr:`tensors`."""
        inputs = {name: tensor for name, tensor in tensors.items() if name not in ("latents", "text")}
        return cls(
            latents_CTHW=tensors["latents"], text_rows_LD=tensors["text"], caption=caption, key=key, inputs=inputs
        )


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """Replaces a sample that cannot be used.

    Attributes:
        key: the sample's name.
        reason: names the file and what is wrong with it.
        damaged: False where nothing is broken, and the clip is merely not wanted (too short, say).
    """

    key: str
    reason: str
    damaged: bool = True


def check_sample(sample: PreparedSample, info: DataInfo, source: str) -> None:
    """Refuse a sample that training could not use.

    Raises:
        DataError: a shape is another one than the data set's, or a value is not finite.
    """
    latents_CTHW, text_rows_LD = sample.latents_CTHW, sample.text_rows_LD
    if latents_CTHW.dtype != torch.float32 or tuple(latents_CTHW.shape) != info.latent_shape:
        found = f"{str(latents_CTHW.dtype).removeprefix('torch.')} {tuple(latents_CTHW.shape)}"
        raise DataError(f"{source}: latents are {found}, {DATASET_FILE} says float32 {info.latent_shape}")
    if text_rows_LD.shape[1:] != (info.text_dim,):
        raise DataError(f"{source}: no text rows of width {info.text_dim}")
    if not 1 <= len(text_rows_LD) <= info.text_length:
        raise DataError(f"{source}: {len(text_rows_LD)} text rows, {DATASET_FILE} allows 1 to {info.text_length}")
    shapes = {name: tuple(tensor.shape) for name, tensor in sample.inputs.items()}
    if shapes != info.inputs:
        raise DataError(f"{source}: further tensors are {shapes}, {DATASET_FILE} says {info.inputs}")
    for name, tensor in sample.tensors.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"{source}: {name} are not finite")


def pad_text_rows(text_rows_LD: torch.Tensor, text_length: int) -> torch.Tensor:
    """Append zero rows up to ``text_length``: what the DiT attends to, without a mask (as the reference does).

    Args:
        text_rows_LD: L <= text_length rows.
        text_length: rows of the result.

    Returns:
        [text_length, D] of the same dtype.

    Raises:
        DataError: more rows than ``text_length``.
    """
    rows = text_rows_LD.shape[0]
    if rows > text_length:
        raise DataError(f"text_length is {text_length}, but a prepared caption has {rows} rows; prepare it again")
    return torch.nn.functional.pad(text_rows_LD, (0, 0, 0, text_length - rows))


class PreparedDataset:
    """Random access to a prepared data set; cheap to open, and its reads are safe between threads and forks.

    Args:
        folder: what ``flashi2v prepare --output`` wrote.

    Raises:
        DataError: the folder, its ``dataset.json``, a shard or a shard's index is missing, unfinished or truncated.
    """

    is_collective = False

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        description = read_description(self.folder)
        self.info: DataInfo = description.info
        self.settings = description.settings
        self.fingerprint = description.fingerprint
        self._shards = description.shards
        for shard in self._shards:
            self._check_shard(shard)
        self._ends = list(accumulate(shard.samples for shard in self._shards))
        self._reader = TarReader()
        self._index = functools.lru_cache(maxsize=CACHED_INDICES)(
            functools.partial(_read_checked_index, self.folder, self.fingerprint)
        )
        self.empty_text_rows_LD: torch.Tensor = self._read_empty_text()

    def __reduce__(self) -> tuple[type[PreparedDataset], tuple[Path]]:
        """Pickled as its folder: a worker that gets a copy opens it anew."""
        return PreparedDataset, (self.folder,)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> PreparedSample:
        """Read one sample.

        Raises:
            IndexError: ``index`` is not in [0, len).
            DataError: its shard is missing, truncated or damaged, or the sample is malformed or not finite; the
                message names the shard.
        """
        tar, member = self._locate(index)
        source = f"{tar} sample {member.key}"
        tensors = parse_tensors(self._reader.read(tar, member.tensors), source=source)
        missing = [name for name in ("latents", "text") if name not in tensors]
        if missing:
            raise DataError(f"{source}: holds no {' and no '.join(missing)}")
        sample = PreparedSample.of_tensors(tensors, str(self.record(index).get("caption", "")), member.key)
        check_sample(sample, self.info, source)
        return sample

    def close(self) -> None:
        """Close all files; reading again reopens them."""
        self._reader.close()

    def fetch(self, indices: Sequence[int]) -> list[PreparedSample | BadSample]:
        """Read samples; report a missing, damaged or malformed one in its place instead of raising."""
        return [self._fetch_one(index) for index in indices]

    def record(self, index: int) -> dict[str, Any]:
        """The sample's facts: raw and cleaned caption, source file, frame indices and more.

        Raises:
            DataError: as for the sample itself.
        """
        tar, sample = self._locate(index)
        data = self._reader.read(tar, sample.record)
        try:
            record = json.loads(data)
        except ValueError as error:
            raise DataError(f"{tar} sample {sample.key}: its record is not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{tar} sample {sample.key}: its record is no JSON object")
        return record

    def _fetch_one(self, index: int) -> PreparedSample | BadSample:
        try:
            return self[index]
        except DataError as error:
            return BadSample(key=self._key(index), reason=str(error))

    def _key(self, index: int) -> str:
        try:
            return self._locate(index)[1].key
        except DataError:  # the shard's index is damaged
            return f"sample {index}"

    def _locate(self, index: int) -> tuple[Path, IndexedSample]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        position = bisect.bisect_right(self._ends, index)
        shard = self._shards[position]
        samples = self._index(shard).samples
        tar = self.folder / SHARD_FOLDER / f"{shard.name}.tar"
        return tar, samples[index - (self._ends[position] - shard.samples)]

    def _check_shard(self, shard: ShardEntry) -> None:
        tar = self.folder / SHARD_FOLDER / f"{shard.name}.tar"
        if not tar.is_file():
            raise DataError(f"{tar}: the shard is missing; restore it or run `flashi2v prepare` again")
        size = tar.stat().st_size
        if size != shard.bytes:
            raise DataError(
                f"{tar}: {size} bytes, {shard.bytes} expected (truncated or overwritten); "
                "restore it, or delete its .json index and run `flashi2v prepare` again"
            )
        if not tar.with_suffix(".json").is_file():
            raise DataError(f"{tar.with_suffix('.json')}: the shard's index is missing; run `flashi2v prepare` again")

    def _read_empty_text(self) -> torch.Tensor:
        path = self.folder / EMPTY_TEXT_FILE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: rows of the empty prompt cannot be read ({error.strerror})") from error
        rows_LD = parse_tensors(data, source=str(path)).get("text")
        if rows_LD is None or rows_LD.ndim != 2 or rows_LD.shape[1] != self.info.text_dim:
            raise DataError(f"{path}: no text rows of width {self.info.text_dim}; prepare the data again")
        return rows_LD


def _read_checked_index(folder: Path, fingerprint: str, shard: ShardEntry) -> ShardIndex:
    path = folder / SHARD_FOLDER / f"{shard.name}.json"
    index = read_index(path)
    if len(index.samples) != shard.samples or index.fingerprint != fingerprint:
        raise DataError(
            f"{path}: {len(index.samples)} samples of settings {index.fingerprint[:12]}, {DATASET_FILE} says "
            f"{shard.samples} of {fingerprint[:12]}; run `flashi2v prepare` again"
        )
    return index
