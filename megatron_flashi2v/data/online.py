"""Training from annotations and video files: clips are encoded when they are needed, and kept.

A sample is bit for bit what ``flashi2v prepare`` would have written for its annotation. The ranks of one replica, which
all need the same samples, each encode a part of them and hand it to the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from cachetools import LRUCache

from megatron_flashi2v.config.errors import ConfigError, UserError
from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.captions import warn_of_emptied
from megatron_flashi2v.data.encoding import Encoders, encode_clip, make_decoder
from megatron_flashi2v.data.encoding_cache import EncodingCache
from megatron_flashi2v.data.fingerprint import data_settings, encoding_settings, settings_hash
from megatron_flashi2v.data.prepared import BadSample, PreparedSample
from megatron_flashi2v.data.reasons import Drop
from megatron_flashi2v.data.selection import select
from megatron_flashi2v.data.shards import parse_tensors

_HEADER_BYTES = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """The ranks that share the encoding, because they all need the same samples.

    Attributes:
        rank: of this process among them.
        size: how many there are.
        gather: given this rank's bytes, those of all ranks in order; all ranks call it together.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda data: [data]


class OnlineDataset:
    """The annotations of ``--annotations`` as a data set.

    Which clips exist is decided by the annotations alone, as opening every file at the start would take hours for
    large sets. A clip that turns out to be damaged or unwanted is reported as bad and replaced by another.

    Args:
        config: checked.
        device: where the encoders run.
        memory_bytes: samples that are kept in memory; the least recently used ones go first.
        cache: folder in which encoded samples are kept for later epochs and runs; None keeps none.
    """

    is_collective = True

    def __init__(
        self, config: EncodingConfig, device: torch.device, *, memory_bytes: int, cache: Path | None = None
    ) -> None:
        self._config = config
        selection = select(config.arguments)
        self._entries = selection.candidates
        self.name = f"--annotations {config.arguments.sources.annotations}"
        if not self._entries:
            raise ConfigError(f"{self.name}: none of {selection.total} annotations passes the filters")
        warn_of_emptied(self._entries, config.arguments.captions)
        self._encoders = Encoders(config, device)
        self._decoder = make_decoder(config)
        self.info = self._encoders.info
        self.fingerprint = settings_hash(data_settings(config, selection.entries, selection.malformed))
        self.empty_text_rows_LD = self._encoders.text_rows("")
        self._cache = None if cache is None else EncodingCache(cache, encoding_settings(config), self.info)
        self._memory: LRUCache[int, PreparedSample | BadSample] = LRUCache(memory_bytes, getsizeof=_size)
        self.replica = Replica()
        self.encoded = self.from_cache = 0

    def __len__(self) -> int:
        return len(self._entries)

    def fetch(self, indices: Sequence[int]) -> list[PreparedSample | BadSample]:
        """The samples; collective over the replica, whose ranks must all ask for the same."""
        missing = [index for index in dict.fromkeys(indices) if index not in self._memory]
        found = {index: self._memory[index] for index in indices if index in self._memory}
        if missing:
            mine = self._make(missing[self.replica.rank :: self.replica.size])
            for data in self.replica.gather(pack(mine)):
                found.update(unpack(data))
            for index in missing:  # in one order on all ranks, which so keep the same ones
                with contextlib.suppress(ValueError):  # larger than all of the memory
                    self._memory[index] = found[index]
        return [found[index] for index in indices]

    def close(self) -> None:
        """End the decoder's processes."""
        self._decoder.close()
        logger.info("this rank encoded %d clips and read %d from the cache", self.encoded, self.from_cache)

    def _make(self, indices: Sequence[int]) -> dict[int, PreparedSample | BadSample]:
        """Samples of this rank's part: from the cache, or encoded."""
        made: dict[int, PreparedSample | BadSample] = {}
        for index in indices:
            kept = None if self._cache is None else self._cache.get(self._entries[index])
            if kept is not None:
                made[index] = kept
                self.from_cache += 1
        rest = [index for index in indices if index not in made]
        entries = [self._entries[index] for index in rest]
        for index, entry, frames in zip(rest, entries, self._decoder.decode(entries), strict=True):
            encoded = frames if isinstance(frames, Drop) else encode_clip(self._config, self._encoders, entry, frames)
            made[index] = self._sample(entry, encoded)
            self.encoded += 1
        return made

    def _sample(self, entry: Entry, encoded: Any) -> PreparedSample | BadSample:
        if isinstance(encoded, Drop):
            return BadSample(key=entry.key, reason=encoded.detail, damaged=encoded.is_error)
        sample = encoded.sample
        if self._cache is not None:
            try:
                self._cache.put(entry, sample)
            except UserError as error:
                logger.warning("%s; the run goes on without writing to its cache", error)
                self._cache = None
        return sample


def _size(sample: PreparedSample | BadSample) -> int:
    return 0 if isinstance(sample, BadSample) else sum(tensor.nbytes for tensor in sample.tensors.values())


def pack(samples: dict[int, PreparedSample | BadSample]) -> bytes:
    """Samples as bytes: the length of a JSON header, the header, and a safetensors file."""
    rows, tensors = [], {}
    for index, sample in samples.items():
        if isinstance(sample, BadSample):
            rows.append({"index": index, "bad": dataclasses.asdict(sample)})
            continue
        rows.append({"index": index, "key": sample.key, "caption": sample.caption})
        tensors.update({f"{name} {index}": tensor for name, tensor in sample.tensors.items()})
    header = json.dumps(rows).encode()
    return len(header).to_bytes(_HEADER_BYTES, "little") + header + safetensors.torch.save(tensors)


def unpack(data: bytes) -> dict[int, PreparedSample | BadSample]:
    """The reverse of :func:`pack`."""
    end = _HEADER_BYTES + int.from_bytes(data[:_HEADER_BYTES], "little")
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in parse_tensors(data[end:], source="samples of another rank").items():
        kind, _, index = name.rpartition(" ")
        tensors.setdefault(index, {})[kind] = tensor
    samples: dict[int, PreparedSample | BadSample] = {}
    for row in json.loads(data[_HEADER_BYTES:end]):
        index = row["index"]
        if "bad" in row:
            samples[index] = BadSample(**row["bad"])
        else:
            samples[index] = PreparedSample.of_tensors(tensors[str(index)], row["caption"], row["key"])
    return samples
