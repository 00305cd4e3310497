"""Gives training a good sample for each position of the global order, from one data set or several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.data.description import DataInfo
from megatron_flashi2v.data.order import BlendOrder
from megatron_flashi2v.data.prepared import BadSample, PreparedSample

MAX_SUBSTITUTES = 100
"""Samples that may be tried for one position before the data set is taken for unreadable."""

_OF_BUCKET = ("latent_shape", "frames", "height", "width")
_FREE = ("text_length", "inputs", "image_encoder")


class SampleSource(Protocol):
    """A data set that training can read: prepared shards, or videos that are encoded when they are needed."""

    info: DataInfo
    name: str
    fingerprint: str
    empty_text_rows_LD: torch.Tensor
    is_collective: bool
    """Whether the ranks of a replica must fetch the same samples together."""

    def __len__(self) -> int:
        """Samples in it."""

    def fetch(self, indices: Sequence[int]) -> list[PreparedSample | BadSample]:
        """Return the samples in order, and report bad ones in their place instead of raising."""

    def close(self) -> None:
        """Close files and end processes."""


@dataclass(frozen=True, kw_only=True)
class BadPosition:
    """A sample that could not be used at a position of the global order.

    Attributes:
        position: of the global order; another sample fills it.
        dataset: name of the data set.
        key: the sample's name in it.
        reason: names the file and what is wrong with it.
        damaged: False where nothing is broken, and the clip is merely not wanted (too short, say).
    """

    position: int
    dataset: str
    key: str
    reason: str
    damaged: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


class Blend:
    """One or several data sets in one global order.

    Data sets whose samples have other shapes (resolution or length) are buckets: every global batch is of one bucket.

    Args:
        datasets: at least one, none empty.
        weights: their shares of the positions.
        batch: samples of a global batch.
        seed: the run's seed.

    Raises:
        ConfigError: a data set is empty, or two were made with other encoders, text cleaning or frame rate.
    """

    def __init__(self, datasets: Sequence[SampleSource], weights: Sequence[float], *, batch: int, seed: int) -> None:
        self.datasets, self.batch = tuple(datasets), batch
        for dataset in datasets:
            if not len(dataset):
                raise ConfigError(f"{dataset.name} holds no samples; prepare it again")
            require_same_kind(dataset, datasets[0])
        shapes = list(dict.fromkeys(dataset.info.latent_shape for dataset in datasets))
        buckets = [shapes.index(dataset.info.latent_shape) for dataset in datasets]
        self.order = BlendOrder([len(dataset) for dataset in datasets], weights, buckets, batch, seed)
        self.latent_shapes: tuple[tuple[int, int, int, int], ...] = tuple(shapes)
        self.empty_text_rows_LD = datasets[0].empty_text_rows_LD
        self.fingerprint = _fingerprint(datasets, weights)

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    @property
    def encodes_together(self) -> bool:
        """Return whether all ranks of a replica must read the same positions together."""
        return any(dataset.is_collective for dataset in self.datasets)

    def close(self) -> None:
        """Close files and end processes."""
        for dataset in self.datasets:
            dataset.close()

    @property
    def info(self) -> DataInfo:
        """Properties common to all samples; sizes are those of the first data set."""
        return self.datasets[0].info

    @property
    def text_length(self) -> int:
        """Most text rows that a caption may have."""
        return max(dataset.info.text_length for dataset in self.datasets)

    @property
    def name(self) -> str:
        """Name in logs."""
        return ", ".join(dataset.name for dataset in self.datasets)

    def latent_shape(self, position: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents in the global batch that a position belongs to."""
        return self.latent_shapes[self.order.bucket(position)]

    def require_whole_batches(self, position: int) -> None:
        """Refuse to start where a global batch would have two shapes.

        Raises:
            ConfigError: the data sets have several shapes, and the position is not at a global batch's start.
        """
        if len(self.latent_shapes) > 1 and position % self.batch:
            raise ConfigError(
                f"--global-batch-size is {self.batch}, which does not divide the {position} samples that the "
                "checkpoint has consumed; with data sets of several shapes it must: keep the earlier run's"
            )

    def read(self, positions: Sequence[int]) -> tuple[list[PreparedSample], list[BadPosition]]:
        """The samples at these positions of the global order.

        Where a sample is bad, another one of its data set fills the position: which one depends on (seed, position)
        alone.

        Returns:
            One good sample for each position, and the bad ones that were met.

        Raises:
            DataError: all of :data:`MAX_SUBSTITUTES` samples that were tried for a position are bad.
        """
        filled: dict[int, PreparedSample] = {}
        bad: list[BadPosition] = []
        for attempt in range(MAX_SUBSTITUTES):
            pending = [position for position in positions if position not in filled]
            if not pending:
                return [filled[position] for position in positions], bad
            places = [
                self.order.substitute(position, attempt) if attempt else self.order.locate(position)
                for position in pending
            ]
            for position, (number, _), sample in zip(pending, places, self._fetch(places), strict=True):
                if isinstance(sample, BadSample):
                    name = self.datasets[number].name
                    bad.append(BadPosition(position=position, dataset=name, **asdict(sample)))
                else:
                    filled[position] = sample
        raise DataError(
            f"{bad[0].dataset}: {MAX_SUBSTITUTES} samples in a row cannot be used; the first is {bad[0].key}: "
            f"{bad[0].reason}"
        )

    def _fetch(self, places: Sequence[tuple[int, int]]) -> list[PreparedSample | BadSample]:
        found: dict[int, PreparedSample | BadSample] = {}
        for number, dataset in enumerate(self.datasets):
            asked = [place for place, (of, _) in enumerate(places) if of == number]
            if asked:
                samples = dataset.fetch([places[place][1] for place in asked])
                found.update(zip(asked, samples, strict=True))
        return [found[place] for place in range(len(places))]


def require_same_kind(dataset: SampleSource, first: SampleSource) -> None:
    """Refuse a data set that cannot be used beside another one in the same run.

    Raises:
        ConfigError: it was made with other encoders, text cleaning or frame rate.
    """
    mine, its = dataset.info.to_json(), first.info.to_json()
    for name in mine.keys() - {*_OF_BUCKET, *_FREE}:
        if mine[name] != its[name]:
            raise ConfigError(
                f"{dataset.name} was prepared with another {name} than {first.name}; the data sets of a run must agree "
                "in it"
            )
    if mine["latent_shape"][0] != its["latent_shape"][0]:
        raise ConfigError(f"latents in {dataset.name} and {first.name} have other numbers of channels")


def _fingerprint(datasets: Sequence[SampleSource], weights: Sequence[float]) -> str:
    if len(datasets) == 1:
        return datasets[0].fingerprint
    parts = [[dataset.fingerprint, weight] for dataset, weight in zip(datasets, weights, strict=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
