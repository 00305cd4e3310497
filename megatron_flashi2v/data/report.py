"""``report.html``: what a prepared data set looks like, on one page without other files."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
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
MIN_BINS, MAX_BINS = 10, 40
MIN_BARS = 4
DIGIT_WIDTH = 0.035
"""Of a label at the end of a bar, as a share of the frame."""

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that lies in the page itself.

    Attributes:
        alt: what it shows.
        data: a PNG or JPEG file.
    """

    alt: str
    data: bytes

    @property
    def source(self) -> str:
        """The image as a data URL."""
        kind = "png" if self.data.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True, kw_only=True)
class SheetFrame:
    """One sample of the contact sheet; its picture is None if its file no longer decodes."""

    picture: Picture | None
    caption: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Values of the histograms, one for each sample that was read.

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
    parts: dict[str, Any] = {}
    if summary["kept"]:
        data = PreparedDataset(folder)
        by_index = {entry.index: entry for entry in entries}
        parts["settings"] = _settings(data)
        parts["histograms"] = Picture(alt="histograms", data=_png(_figure(_facts(data, by_index), summary)))
        parts["sheet"] = _contact_sheet(data, config, by_index)
        data.close()
    atomic_write_text(folder / REPORT_FILE, render(counts=_counts(summary), **parts))


def render(
    *,
    counts: Sequence[Sequence[object]],
    settings: Sequence[Sequence[object]] = (),
    histograms: Picture | None = None,
    sheet: Sequence[SheetFrame] = (),
) -> str:
    """The page, in which all text is escaped; ``counts`` alone where no sample was kept."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    template = environment.get_template(TEMPLATE)
    return template.render(counts=counts, settings=settings, histograms=histograms, sheet=sheet)


def _counts(summary: dict[str, Any]) -> list[tuple[object, ...]]:
    """Rows (what, count, meaning, first example)."""
    rows: list[tuple[object, ...]] = [("annotations", summary["entries"], "", "")]
    rows.append(("kept", summary["kept"], f"{summary['shards']} shards", ""))
    emptied = summary.get("emptied_captions", {"count": 0})
    if emptied["count"]:
        rows.append(("captions nearly emptied", emptied["count"], emptied["meaning"], emptied["example"]))
    for reason, group in summary["dropped"].items():
        first = group["examples"][0]["detail"] if group["examples"] else ""
        rows.append((f"dropped: {reason}", group["count"], group["meaning"], first))
    return rows


def _settings(data: PreparedDataset) -> list[tuple[str, str]]:
    """Rows (what, value)."""
    info = data.info
    return [
        ("sample", f"{info.frames} frames of {info.width} x {info.height} pixels at {info.fps:g} fps"),
        ("latents", " x ".join(map(str, info.latent_shape))),
        ("text", f"at most {info.text_length} rows of {info.text_dim}, cleaning {info.text_cleaning}"),
        ("settings", data.fingerprint),
    ]


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
        axes[place].hist(values, bins=histogram_edges(values))
        axes[place].set_xlabel(label)
        axes[place].set_ylabel("samples")
        axes[place].yaxis.get_major_locator().set_params(integer=True)
    _bars(axes[3], Counter(facts.sizes).most_common(SHOWN_SIZES), "picture size of the file")
    reasons = [("kept", summary["kept"])]
    reasons += [(reason, group["count"]) for reason, group in summary["dropped"].items()]
    _bars(axes[4], reasons, "kept, and dropped by reason")
    axes[5].set_axis_off()
    return figure


def histogram_edges(values: Sequence[float]) -> list[float]:
    """Edges of 10 to 40 bins of one width, which hold all values; whole numbers stand in the middle of theirs.

    Args:
        values: at least one.
    """
    low, high = min(values), max(values)
    if all(isinstance(value, int) for value in values):
        width = float(-(-(high - low + 1) // MAX_BINS))
        low, high = low - 0.5, high + 0.5
    else:
        bins = min(MAX_BINS, max(MIN_BINS, len(set(values))))
        # Values that are all alike get bins of a tenth of them.
        width = (high - low) / bins or abs(high) / MIN_BINS or 1.0
    needed = math.ceil((high - low) / width - 1e-9)
    count = max(MIN_BINS, needed)
    first = low - width * ((count - needed) // 2)
    return [first + width * place for place in range(count)] + [max(first + width * count, high)]


def _bars(axes: Axes, counts: Sequence[tuple[str, int]], title: str) -> None:
    names, values = [name for name, _ in counts], [value for _, value in counts]
    bars = axes.barh(range(len(names)), values)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), MIN_BARS) - 0.5, -0.5)  # from above; few bars are not thick
    labels = [f"{value:,}" for value in values]
    axes.bar_label(bars, labels, padding=2)
    axes.set_xticks([])
    room = DIGIT_WIDTH * (1 + max(map(len, labels)))
    axes.set_xlim(0, max(max(values), 1) / (1 - room))
    axes.set_title(title)


def _contact_sheet(data: PreparedDataset, config: EncodingConfig, entries: dict[int, Entry]) -> list[SheetFrame]:
    records = [data.record(index) for index in _spread(len(data), MAX_PICTURES)]
    chosen = [entries[record["entry"]] for record in records]
    decoder = make_decoder(config)
    frames = []
    for record, found in zip(records, decoder.decode(chosen), strict=True):
        picture = None
        if isinstance(found, Frames):
            picture = Picture(alt=record["source"], data=_thumbnail(found.frames_TCHW[0]))
        caption = f"{record['source']}, frame {record['frames'][0]}: {record['caption']}"
        frames.append(SheetFrame(picture=picture, caption=caption))
    decoder.close()
    return frames


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
