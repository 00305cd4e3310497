"""Encoded samples on disk, one safetensors file each, for later epochs and runs."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.description import DataInfo
from megatron_flashi2v.data.fingerprint import settings_hash
from megatron_flashi2v.data.prepared import PreparedSample, check_sample
from megatron_flashi2v.runtime.files import atomic_write_bytes

logger = logging.getLogger(__name__)


class EncodingCache:
    """A folder of samples by annotation and settings; several runs may share it.

    Args:
        folder: made if missing.
        settings: everything besides the annotation that decides a sample.
        info: what all samples have in common.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], info: DataInfo) -> None:
        self._settings, self._info = settings_hash(settings), info
        self._folder = folder / self._settings[:16]

    def get(self, entry: Entry) -> PreparedSample | None:
        """The annotation's sample; None where there is none, or a damaged one."""
        path = self._path(entry)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sample = PreparedSample.of_tensors(tensors, facts["caption"], entry.key)
            if facts["crc32"] != str(_checksum(tensors)):
                raise DataError(f"{path}: damaged, its bytes do not match their checksum")
            check_sample(sample, self._info, str(path))
        except (safetensors.SafetensorError, OSError, KeyError, DataError) as error:
            logger.warning("%s cannot be used (%s); its clip is encoded again", path, error)
            return None
        return sample

    def put(self, entry: Entry, sample: PreparedSample) -> None:
        """Keep a sample.

        Raises:
            UserError: the disk is full or failing.
        """
        tensors = sample.tensors
        facts = {"caption": sample.caption, "crc32": str(_checksum(tensors))}
        atomic_write_bytes(self._path(entry), safetensors.torch.save(tensors, metadata=facts))

    def _path(self, entry: Entry) -> Path:
        names = [name for name in Entry.__slots__ if name not in ("index", "source")]
        values = [getattr(entry, name) for name in names]
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        return self._folder / digest[:2] / f"{entry.key}-{digest[:8]}.safetensors"


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, checksum)
    return checksum
