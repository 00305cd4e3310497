"""WebDataset-style tar shards with an index beside each one, for random access without unpacking.

A shard is ``shard-000000.tar`` whose members are ``KEY.safetensors`` (the tensors) and ``KEY.json`` (the record), and
``shard-000000.json``, its index: offsets, sizes and checksums of the members. The index is published after the tar,
so a shard exists exactly when its index does; a tar without one is the rest of a killed run and is written again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import weakref
import zlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object, write_errors
from megatron_flashi2v.runtime.text import to_utf8

SHARD_FORMAT = "megatron_flashi2v-shard"
SHARD_VERSION = 1
SHARD_FOLDER = "shards"
TAR_BLOCK = 512
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
SHARD_PATTERN = re.compile(r"shard-[0-9]{6,}")


def shard_name(number: int) -> str:
    """``shard-000012`` for 12."""
    return f"shard-{number:06d}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where one file's bytes lie inside a tar: byte offset, byte count, and their CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class IndexedSample:
    """One sample of a shard: its key and where its two files lie."""

    key: str
    tensors: Member
    record: Member


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Contents of a shard's index.

    Attributes:
        number: which shard of the data set this is.
        fingerprint: hash of the settings that the shard was made with.
        tar_bytes: size of the tar.
        tar_sha256: hash of the whole tar.
        samples: in the order in which they were written.
        dropped: one JSON object per annotation that gave no sample, with its reason.
        seconds: wall-clock time that the shard took.
        emptied: captions that lost more than half of their letters in cleaning; 0 where the writer did not count.
        emptied_example: one of them, before and after; empty where there is none.
    """

    number: int
    fingerprint: str
    tar_bytes: int
    tar_sha256: str
    samples: tuple[IndexedSample, ...]
    dropped: tuple[dict[str, Any], ...]
    seconds: float
    emptied: int = 0
    emptied_example: str = ""


class _HashingFile(io.RawIOBase):
    """An append-only file that hashes what passes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.sha256 = hashlib.sha256()
        self.written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        self.sha256.update(data)
        self.written += count
        return count

    def tell(self) -> int:
        return self.written

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()


class ShardWriter:
    """Writes one shard under a temporary name and publishes it when it is whole.

    The tar's bytes depend on the samples alone (no times, owners or host names in the headers).

    Args:
        folder: the data set's ``shards`` folder; it must exist.
        number: the shard's number.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self._temporary = folder / f".{shard_name(number)}.{os.getpid()}.tmp"
        self._samples: list[IndexedSample] = []
        with write_errors(self._temporary):
            self._file = _HashingFile(self._temporary)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    @property
    def keys(self) -> set[str]:
        """Keys written so far."""
        return {sample.key for sample in self._samples}

    def add(self, key: str, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Append one sample.

        Args:
            key: unique in the data set; letters, digits, ``_`` and ``-`` only (a dot would split the key for readers
                of the WebDataset layout).
            tensors: contiguous host tensors.
            record: JSON-ready facts about the sample.

        Raises:
            ValueError: a key that is malformed or was already used in this shard.
            UserError: the disk is full or failing; the shard is discarded.
        """
        if not KEY_PATTERN.fullmatch(key) or key in self.keys:
            raise ValueError(f"sample key {key!r} is malformed or already in {shard_name(self._number)}")
        with self._discarding():
            sample = IndexedSample(
                key=key,
                tensors=self._append(f"{key}.safetensors", safetensors.torch.save(tensors)),
                record=self._append(f"{key}.json", to_utf8(json.dumps(record, ensure_ascii=False))),
            )
        self._samples.append(sample)

    def _append(self, name: str, data: bytes) -> Member:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        offset = self._tar.offset + TAR_BLOCK
        self._tar.addfile(header, io.BytesIO(data))
        return Member(offset=offset, size=len(data), crc32=zlib.crc32(data))

    def publish(
        self, *, fingerprint: str, dropped: list[dict[str, Any]], seconds: float, emptied: int = 0,
        emptied_example: str = "",
    ) -> ShardIndex:
        """Close the tar, rename it into place, then write its index.

        Raises:
            UserError: the disk is full or failing; the shard is discarded.
        """
        with self._discarding():
            self._tar.close()
            self._file.sync()
            self._file.close()
            index = ShardIndex(
                number=self._number,
                fingerprint=fingerprint,
                tar_bytes=self._file.written,
                tar_sha256=self._file.sha256.hexdigest(),
                samples=tuple(self._samples),
                dropped=tuple(dropped),
                seconds=seconds,
                emptied=emptied,
                emptied_example=emptied_example,
            )
            os.replace(self._temporary, tar_path(self._folder, self._number))
            atomic_write_json(index_path(self._folder, self._number), _index_to_json(index))
        return index

    def discard(self) -> None:
        """Remove what was written; nothing of the shard remains."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        """Errors of the disk name the tar; whatever the error, nothing half-written stays."""
        try:
            with write_errors(tar_path(self._folder, self._number)):
                yield
        except BaseException:
            self.discard()
            raise


def tar_path(folder: Path, number: int) -> Path:
    """Path of a shard's tar in the ``shards`` folder."""
    return folder / f"{shard_name(number)}.tar"


def index_path(folder: Path, number: int) -> Path:
    """Path of a shard's index in the ``shards`` folder."""
    return folder / f"{shard_name(number)}.json"


def remove_leftovers(folder: Path, numbers: Collection[int]) -> None:
    """Delete the temporary files that a killed run left for these shards."""
    names = {shard_name(number) for number in numbers}
    for path in folder.glob(".shard-*"):
        if path.name[1:].split(".")[0] in names:
            path.unlink(missing_ok=True)


def read_index(path: Path) -> ShardIndex:
    """Read a shard's index.

    Raises:
        DataError: the file is missing, no JSON, or not an index of this version.
    """
    if not path.is_file():
        raise DataError(f"{path}: the shard's index is missing; run `flashi2v prepare` again to write it")
    values = read_json_object(path, error=DataError)
    try:
        if values["format"] != SHARD_FORMAT or values["version"] != SHARD_VERSION:
            raise DataError(
                f"{path}: format {values['format']!r} version {values['version']!r}; "
                f"this program reads {SHARD_FORMAT!r} version {SHARD_VERSION}"
            )
        tar_bytes = int(values["tar"]["bytes"])
        return ShardIndex(
            number=int(values["shard"]),
            fingerprint=str(values["fingerprint"]),
            tar_bytes=tar_bytes,
            tar_sha256=str(values["tar"]["sha256"]),
            samples=tuple(
                IndexedSample(
                    key=str(sample["key"]),
                    tensors=_member(sample["tensors"], tar_bytes), record=_member(sample["record"], tar_bytes),
                )
                for sample in values["samples"]
            ),
            dropped=tuple(values["dropped"]),
            seconds=float(values["seconds"]),
            emptied=int(values.get("emptied", 0)),
            emptied_example=str(values.get("emptied_example", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a shard's index ({type(error).__name__}: {error}); prepare it again") from error


def _member(values: dict[str, Any], tar_bytes: int) -> Member:
    """A member that lies inside its tar: what is claimed beyond is not asked of the memory."""
    member = Member(**values)
    if not all(isinstance(value, int) for value in (member.offset, member.size, member.crc32)):
        raise TypeError(f"{values} must be integers")
    if not 0 <= member.offset <= member.offset + member.size <= tar_bytes:
        raise ValueError(f"{values} does not lie within the tar's {tar_bytes} bytes")
    return member


def _index_to_json(index: ShardIndex) -> dict[str, Any]:
    return {
        "format": SHARD_FORMAT,
        "version": SHARD_VERSION,
        "shard": index.number,
        "fingerprint": index.fingerprint,
        "tar": {"name": f"{shard_name(index.number)}.tar", "bytes": index.tar_bytes, "sha256": index.tar_sha256},
        "samples": [asdict(sample) for sample in index.samples],
        "dropped": list(index.dropped),
        "seconds": round(index.seconds, 3),
        "emptied": index.emptied,
        "emptied_example": index.emptied_example,
    }


class TarReader:
    """Reads members at their offsets with ``pread``: no unpacking, no seek shared between threads or forks.

    Args:
        max_open: tars kept open at a time, so that data sets of many shards stay under the limit of open files.
    """

    def __init__(self, max_open: int = 64) -> None:
        self._max_open = max_open
        self._open = functools.lru_cache(maxsize=max_open)(_OpenFile)

    def __reduce__(self) -> tuple[type[TarReader], tuple[int]]:
        """Pickled without its open files."""
        return TarReader, (self._max_open,)

    def read(self, path: Path, member: Member) -> bytes:
        """The member's bytes, checked against its CRC-32.

        What fails is tried once more with all files opened afresh: network file systems drop open files and
        connections now and then.

        Raises:
            DataError: the tar is missing, ends early, or holds other bytes than were written.
        """
        try:
            return self._read_once(path, member)
        except DataError:
            self._open.cache_clear()
            return self._read_once(path, member)

    def _read_once(self, path: Path, member: Member) -> bytes:
        try:
            file = self._open(path)
            data = os.pread(file.descriptor, member.size, member.offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); restore it or prepare it again") from error
        if len(data) != member.size:
            raise DataError(
                f"{path}: truncated, {len(data)} of {member.size} bytes at offset {member.offset}; "
                "restore it, or delete its .json index and run `flashi2v prepare` again"
            )
        if zlib.crc32(data) != member.crc32:
            raise DataError(
                f"{path}: damaged, {member.size} bytes at offset {member.offset} do not match their checksum; "
                "restore it, or delete its .json index and run `flashi2v prepare` again"
            )
        return data

    def close(self) -> None:
        """Close every tar; reading again reopens them."""
        self._open.cache_clear()


class _OpenFile:
    """A file open for reading; closed once neither the cache nor a read, maybe another thread's, refers to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self.descriptor)


def parse_tensors(data: bytes, *, source: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file held in memory; ``source`` names it in errors.

    Raises:
        DataError: the bytes are no safetensors file.
    """
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{source}: not a safetensors file ({error})") from error
