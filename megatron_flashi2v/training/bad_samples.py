"""Samples that could not be used: agreed by all ranks, recorded by rank 0, and a limit to how many there may be."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.blend import BadPosition
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.runtime.files import atomic_write_text, read_jsonl
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.training.metrics import RowFile

BAD_SAMPLES_FILE = "bad_samples.jsonl"

logger = logging.getLogger(__name__)


class BadSampleLedger:
    """The bad samples of a run, the same on all ranks.

    Rows past the position that a resumed run starts from are dropped: they will be met again.

    Args:
        folder: ``--save``, where rank 0 keeps :data:`BAD_SAMPLES_FILE`; None keeps nothing.
        limit: different bad samples that may be met.
        consumed: position that the run starts from.
        replica: which of the replicas this rank belongs to.
        reads: whether this rank reads samples (middle pipeline stages do not).
    """

    def __init__(
        self, folder: Path | None, limit: int, *, consumed: int, replica: int, reads: bool
    ) -> None:
        self._limit, self._replica, self._reads = limit, replica, reads
        path = None if folder is None or torch.distributed.get_rank() else folder / BAD_SAMPLES_FILE
        self._file = RowFile(path)
        earlier = [] if path is None else _rows_before(path, consumed)
        self._rows: list[dict[str, Any]] = gather_json(earlier)[0]
        self._require_few()

    def settle(self, own: Sequence[BadPosition], counted: int) -> None:
        """Agree on the bad samples of an iteration; all ranks call it, before they update the weights.

        Args:
            own: those that this rank met.
            counted: the sum of ``len(own)`` over all ranks; nothing is exchanged where it is 0.

        Raises:
            DataError: on all ranks: more than the limit were met, or ranks of one replica read other bytes.
        """
        if not counted:
            return
        found = gather_json({"replica": self._replica, "reads": self._reads, "rows": [row.to_json() for row in own]})
        _require_agreement(found)
        # The ranks of a replica met the same ones.
        fresh = {(row["position"], row["dataset"], row["key"]): row for report in found for row in report["rows"]}
        for row in sorted(fresh.values(), key=lambda row: row["position"]):
            self._record(row)
        self._require_few()

    def _record(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        logger.warning("bad sample at position %d: %s; another one fills it", row["position"], row["reason"],
                       extra=AGREED)
        self._file.append(row)

    def _require_few(self) -> None:
        damaged = [row for row in self._rows if row["damaged"]]
        different = {(row["dataset"], row["key"]) for row in damaged}
        if len(different) > self._limit:
            first = damaged[0]
            raise DataError(
                f"{len(different)} bad samples were met, and --max-bad-samples allows {self._limit}; the first, at "
                f"position {first['position']}: {first['dataset']} sample {first['key']}: {first['reason']}"
            )


def _rows_before(path: Path, consumed: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = [row for row in read_jsonl(path) if row["position"] < consumed]
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _require_agreement(found: list[dict[str, Any]]) -> None:
    """Refuse an iteration in which ranks of one replica trained on other samples than their peers.

    Raises:
        DataError: names the rank, the sample and the reason.
    """
    first: dict[int, tuple[int, dict[tuple[int, str], str]]] = {}
    for rank, report in enumerate(found):
        if not report["reads"]:
            continue
        mine = {(row["position"], row["key"]): row["reason"] for row in report["rows"]}
        peer, its = first.setdefault(report["replica"], (rank, mine))
        if mine.keys() != its.keys():
            position, key = min(mine.keys() ^ its.keys())
            failing, other = (rank, peer) if (position, key) in mine else (peer, rank)
            reason = mine.get((position, key)) or its[position, key]
            raise DataError(
                f"rank {failing} could not use sample {key} at position {position}, which rank {other} could: "
                f"{reason}; they share a replica and must see the same bytes: check their file system, and resume"
            )
