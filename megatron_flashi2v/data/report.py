"""``report.html``: what a prepared data set looks like, on one page without other files."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.clips import Frames
from megatron_flashi2v.data.encoding import make_decoder
from megatron_flashi2v.data.filters import clip_length
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.runtime.files import atomic_write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT_FILE = "report.html"
MAX_RECORDS = 20_000
"""Samples whose records are read for the histograms, evenly spaced."""
MAX_PICTURES = 24
PICTURE_WIDTH = 240
"""Pixels."""
SHOWN_SIZES = 8

_STYLE = (
    "body{font:14px sans-serif;max-width:1100px;margin:2em auto;color:#222}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:4px 8px;text-align:left;vertical-align:top}"
    ".sheet{display:flex;flex-wrap:wrap;gap:12px}figure{width:240px;margin:0}figcaption{font-size:12px}img{max-width:100%}"
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the histograms show, one value for each sample that was looked at.

    Attributes:
        seconds: length of the annotated clip in its file.
        sizes: "width x height" of the file's picture, in pixels.
        words: words of the caption as it was tokenised.
        text_rows: rows of the caption, at most the text length.
    """

    seconds: list[float]
    sizes: list[str]
    words: list[int]
    text_rows: list[int]


def write_report(folder: Path, config: EncodingConfig, entries: Sequence[Entry], summary: dict[str, Any]) -> None:
    """Write the report of a finished data set.

    Args:
        folder: the data set's.
        config: what it was prepared with; its videos are opened once more for the pictures.
        entries: annotations that passed the first filters.
        summary: the contents of ``summary.json``.
    """
    parts = ["<h1>Prepared data</h1>", _counts(summary)]
    if summary["kept"]:
        data = PreparedDataset(folder)
        by_index = {entry.index: entry for entry in entries}
        facts = _facts(data, by_index)
        parts += [_settings(data), "<h2>Samples</h2>", _picture(_png(_figure(facts, summary)), "histograms")]
        parts += ["<h2>Contact sheet</h2>", _contact_sheet(data, config, by_index)]
        data.close()
    page = f"<!doctype html><meta charset=utf-8><title>Prepared data</title><style>{_STYLE}</style>"
    atomic_write_text(folder / REPORT_FILE, page + "\n".join(parts) + "\n")


def _counts(summary: dict[str, Any]) -> str:
    rows = [("annotations", summary["entries"], "", ""), ("kept", summary["kept"], f"{summary['shards']} shards", "")]
    for reason, group in summary["dropped"].items():
        first = group["examples"][0]["detail"] if group["examples"] else ""
        rows.append((f"dropped: {reason}", group["count"], group["meaning"], first))
    return _table(("what", "count", "meaning", "first example"), rows) + (
        "<p>Every dropped annotation stands with its reason in <code>dropped.jsonl</code>.</p>"
    )


def _settings(data: PreparedDataset) -> str:
    info = data.info
    rows = [
        ("sample", f"{info.frames} frames of {info.width} x {info.height} pixels at {info.fps:g} fps"),
        ("latents", " x ".join(map(str, info.latent_shape))),
        ("text", f"at most {info.text_length} rows of {info.text_dim}, cleaning {info.text_cleaning}"),
        ("settings", data.fingerprint),
    ]
    return "<h2>Settings</h2>" + _table(("what", "value"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` numbers, evenly spaced."""
    return sorted({place * count // min(count, most) for place in range(min(count, most))})


def _facts(data: PreparedDataset, entries: dict[int, Entry]) -> Facts:
    facts = Facts(seconds=[], sizes=[], words=[], text_rows=[])
    for index in _spread(len(data), MAX_RECORDS):
        record = data.record(index)
        entry = entries[record["entry"]]
        left = record["source_frames"] - entry.start_frame
        length = clip_length(entry, "corrected")
        facts.seconds.append((left if length is None else min(left, length)) / record["source_fps"])
        facts.sizes.append(f"{record['source_width']} x {record['source_height']}")
        facts.words.append(len(record["caption"].split()))
        facts.text_rows.append(record["text_rows"])
    return facts


def _figure(facts: Facts, summary: dict[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    shown: list[tuple[Sequence[float], str]] = [
        (facts.seconds, "length of the annotated clip, s"),
        (facts.words, "words of the caption"),
        (facts.text_rows, "text rows"),
    ]
    for place, (values, label) in enumerate(shown):
        axes[place].hist(values, bins=min(40, max(1, len(set(values)))))
        axes[place].set_xlabel(label)
        axes[place].set_ylabel("samples")
    _bars(axes[3], Counter(facts.sizes).most_common(SHOWN_SIZES), "picture size of the file")
    reasons = [("kept", summary["kept"])]
    reasons += [(reason, group["count"]) for reason, group in summary["dropped"].items()]
    _bars(axes[4], reasons, "kept, and dropped by reason")
    axes[5].set_axis_off()
    return figure


def _bars(axes: Axes, counts: Sequence[tuple[str, int]], title: str) -> None:
    names, values = [name for name, _ in counts], [value for _, value in counts]
    bars = axes.barh(range(len(names)), values)
    axes.set_yticks(range(len(names)), names)
    axes.bar_label(bars, padding=2)
    axes.invert_yaxis()
    axes.set_title(title)


def _contact_sheet(data: PreparedDataset, config: EncodingConfig, entries: dict[int, Entry]) -> str:
    records = [data.record(index) for index in _spread(len(data), MAX_PICTURES)]
    chosen = [entries[record["entry"]] for record in records]
    decoder = make_decoder(config)
    figures = []
    for record, found in zip(records, decoder.decode(chosen), strict=True):
        # The file may be gone since.
        shown = _picture(_thumbnail(found.frames_TCHW[0]), record["source"]) if isinstance(found, Frames) else ""
        caption = f"{record['source']}, frame {record['frames'][0]}: {record['caption']}"
        figures.append(f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>")
    decoder.close()
    return f"<div class=sheet>{''.join(figures)}</div>"


def _thumbnail(frame_CHW: torch.Tensor) -> bytes:
    from PIL import Image

    image = Image.fromarray(frame_CHW.permute(1, 2, 0).contiguous().numpy())
    image = image.resize((PICTURE_WIDTH, max(1, round(PICTURE_WIDTH * image.height / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _picture(data: bytes, what: str) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    text = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(what, quote=True)}" src="data:image/{kind};base64,{text}">'
