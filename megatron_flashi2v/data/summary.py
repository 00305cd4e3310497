"""What became of the annotations: ``summary.json``, the list of all that were dropped, and a table for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.reasons import REASONS
from megatron_flashi2v.runtime.files import atomic_write_json, atomic_write_text, read_json_object

SUMMARY_FILE = "summary.json"
DROPPED_FILE = "dropped.jsonl"
EXAMPLES = 3
EMPTIED = "lost more than half of their letters in cleaning; --text-cleaning light keeps them"


def summarise(
    *, entries: int, dropped: Sequence[dict[str, Any]], samples: int, shards: int, size: int, seconds: float,
    emptied: int = 0, emptied_example: str = "",
) -> dict[str, Any]:
    """The contents of ``summary.json``.

    Args:
        entries: annotations in all.
        dropped: one object per annotation without a sample (``entry, source, path, reason, detail``).
        samples: annotations with one.
        shards: written.
        size: bytes of all shards.
        seconds: time spent on shards, summed over all processes and runs.
        emptied: captions that lost more than half of their letters in cleaning.
        emptied_example: one of them.
    """
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(dropped, key=lambda row: row["entry"]):
        by_reason.setdefault(row["reason"], []).append(row)
    return {
        "entries": entries,
        "kept": samples,
        "dropped": {
            reason: {
                "count": len(rows),
                "meaning": REASONS.get(reason, ""),
                "examples": [{"path": row["path"], "detail": row["detail"]} for row in rows[:EXAMPLES]],
            }
            for reason, rows in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
        },
        "shards": shards,
        "bytes": size,
        "seconds": round(seconds, 3),
        "emptied_captions": {"count": emptied, "meaning": EMPTIED if emptied else "", "example": emptied_example},
    }


def write_summary(folder: Path, summary: dict[str, Any], dropped: Sequence[dict[str, Any]]) -> None:
    """Write ``dropped.jsonl`` (every dropped annotation, in order) and ``summary.json``."""
    rows = sorted(dropped, key=lambda row: row["entry"])
    atomic_write_text(folder / DROPPED_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    atomic_write_json(folder / SUMMARY_FILE, summary)


def read_summary(folder: Path) -> dict[str, Any]:
    """Read ``summary.json``.

    Raises:
        DataError: missing or malformed.
    """
    return read_json_object(folder / SUMMARY_FILE, error=DataError)


def require_samples(summary: dict[str, Any]) -> None:
    """Refuse a data set without a sample.

    Raises:
        DataError: says how many were dropped for which reason, and shows the first.
    """
    if summary["kept"]:
        return
    reasons = ", ".join(f"{name} {group['count']}" for name, group in summary["dropped"].items())
    first = next(iter(summary["dropped"].values()))["examples"][0]["detail"]
    raise DataError(
        f"none of {summary['entries']} annotations was kept ({reasons}); the first: {first}; if you correct files "
        "that were seen already, run again with --fresh"
    )


def summary_table(summary: dict[str, Any], folder: Path) -> Table:
    """The summary for a terminal."""
    table = Table(title=f"prepared data in {folder}", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("detail", overflow="fold")
    table.add_row("annotations", f"{summary['entries']:,}", "")
    table.add_row("kept", f"{summary['kept']:,}", f"{summary['shards']:,} shards, {summary['bytes'] / 2**20:,.1f} MiB")
    emptied = summary.get("emptied_captions", {"count": 0})
    if emptied["count"]:
        detail = Text(f"{emptied['meaning']}\ne.g. {emptied['example']}")
        table.add_row("captions nearly emptied", f"{emptied['count']:,}", detail)
    for reason, group in summary["dropped"].items():
        examples = [f"e.g. {example['detail']}" for example in group["examples"][:1]]
        # Text, not markup: captions and paths may hold brackets.
        table.add_row(f"dropped: {reason}", f"{group['count']:,}", Text("\n".join([group["meaning"], *examples])))
    table.add_row("report", "", Text(str(folder / "report.html")))
    table.add_row("seconds", f"{summary['seconds']:,.1f}", "over all processes")
    return table
