"""The page of an experiment: ``report.html``, its curves as ``curves.png``, and ``report.json``."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from megatron_flashi2v.runtime.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from paradigms.conclusions import (
    JUDGED,
    along_training,
    at_end,
    conclude,
    follows_law,
    paradigms_of,
    shown,
)
from paradigms.settings import SET_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIP_ENLARGE = 4
STRIP_GAP = 2
COLUMNS = {
    "frozen": "frozen", "lost": "object not seen", "law": "steps by the law", "cells": "frames in the right cell",
    "object": "object named right", "path_share": "share of the path", "x0_error": "x0 error",
}  # fmt: skip

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Image-to-video paradigms, in and out of domain</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: 3px 9px; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
img { max-width: 100%; height: auto } .pixels { image-rendering: pixelated }
.note { color: #555 } .low { color: #b00020; font-weight: 600 }
</style>
</head>
<body>
<h1>Image-to-video paradigms, in and out of domain</h1>
<p>{% for sentence in sentences %}{{ sentence }} {% endfor %}</p>

<h2>Curves</h2>
<img src="data:image/png;base64,{{ curves }}" alt="curves">
<p class="note">Above: Fréchet distance of each chunk by set, at the end of training; dashed: between real clips and as
many other real ones{{ floor }}. Middle: PSNR to {{ psnr }}, and {{ motion }}, over time. Below: figures against the
error in domain, along training; at one place of the x axis, paradigms are equally good in domain. Hollow: a checkpoint
that does not follow the law there. Bands and bars: 95% intervals over videos.</p>

<h2>At the end of training</h2>
<table>
<tr><th>paradigm</th><th>pictures</th><th>Fréchet by chunk</th>
{% for title in columns %}<th>{{ title }}</th>{% endfor %}<th>first frame, dB</th></tr>
{% for row in rows %}
<tr><td{% if row.inconclusive %} class="low"{% endif %}>
{{ row.paradigm }}{% if row.inconclusive %}: inconclusive{% endif %}</td>
<td>{{ row.set }}</td>{% for cell in row.cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<p class="note">{{ footnote }}</p>

{% if strips %}
<h2>Samples</h2>
<table>
{% for strip in strips %}
<tr><td>{{ strip.set }}</td><td>{{ strip.label }}</td>
<td><img class="pixels" src="data:image/png;base64,{{ strip.picture }}" alt="frames"></td></tr>
{% endfor %}
</table>
{% endif %}
</body>
</html>
"""


def write_page(folder: Path, report: dict[str, Any], strips: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the three files.

    Args:
        folder: of the experiment.
        report: ``settings``, ``real`` (by set) and ``runs`` (rows with paradigm, seed, iteration and sets).
        strips: set, label and frames uint8 ``[N, T, H, W, C]`` of some samples.
    """
    import jinja2

    sentences = conclude(report)
    curves = draw_curves(report)
    atomic_write_json(folder / "report.json", {**report, "conclusions": sentences})
    atomic_write_bytes(folder / "curves.png", curves)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE).render(
        sentences=sentences,
        curves=base64.b64encode(curves).decode(),
        columns=[COLUMNS[figure] for figure in _measured(report)],
        rows=table_rows(report),
        psnr=_psnr_title(report),
        motion=_motion(report)[1],
        floor=(
            "; where a picture decides the clip, as here, a perfect model lies below, at 0" if "classifier" in report
            else ""
        ),
        footnote=_footnote(report),
        strips=[
            {"set": SET_NAMES[strip["set"]], "label": strip["label"], "picture": _strip_png(strip["frames"])}
            for strip in strips
        ],
    )
    atomic_write_text(folder / "report.html", page)


def table_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each paradigm and set, of texts."""
    return [
        {
            "paradigm": paradigm,
            "set": title,
            "inconclusive": follows_law(report, paradigm) is False,
            "cells": [
                " ".join(f"{value:.2f}" for value in _means(report, paradigm, name, "frechet")),
                *(_cell(at_end(report, paradigm, name, figure)) for figure in _measured(report)),
                f"{_means(report, paradigm, name, 'psnr')[0]:.1f}",
            ],
        }
        for paradigm in paradigms_of(report) for name, title in SET_NAMES.items()
    ]  # fmt: skip


def draw_curves(report: Mapping[str, Any]) -> bytes:
    """All curves as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3)
    for place, (name, title) in enumerate(SET_NAMES.items()):
        _over_time(axes[0, place], report, name, "frechet", f"Fréchet distance by chunk, {title}")
        floor = report["real"].get(name, {}).get("frechet")
        if floor is not None:
            axes[0, place].plot(range(len(floor["mean"])), floor["mean"], "--", color="0.4", label="real to real")
    top = max(panel.get_ylim()[1] for panel in axes[0])
    for panel in axes[0]:
        panel.set_ylim(0, top)
    _over_time(axes[1, 0], report, "held", "psnr", f"PSNR to {_psnr_title(report)}, held, dB")
    _over_time(axes[1, 1], report, "out", "psnr", f"PSNR to {_psnr_title(report)}, out of domain, dB")
    motion, title = _motion(report)
    _over_time(axes[1, 2], report, "out", motion, f"{title}, out of domain")
    failed = "failed" if "failed" in report["runs"][0]["sets"]["held"] else "frozen"
    _against_error(axes[2, 0], report, failed, f"{JUDGED[failed][0]}, out of domain less held", gap=True)
    if "law" in _measured(report):
        _against_error(axes[2, 1], report, "law", "steps by the law, out of domain less held", gap=True)
        _against_error(axes[2, 2], report, "law", "steps by the law, out of domain")
    else:
        _against_error(axes[2, 1], report, "path_share", "share of the path, out of domain less held", gap=True)
        _against_error(axes[2, 2], report, "path_share", "share of the path, out of domain")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[2, 0].legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _over_time(axes: Axes, report: Mapping[str, Any], name: str, figure: str, title: str) -> None:
    for number, paradigm in enumerate(paradigms_of(report)):
        found = at_end(report, paradigm, name, figure)
        if found is None:
            continue
        places = np.arange(len(found["mean"]))
        axes.plot(places, found["mean"], "o-", color=f"C{number}", markersize=3, label=_label(report, paradigm))
        axes.fill_between(places, found["low"], found["high"], color=f"C{number}", alpha=0.15, linewidth=0)
    axes.set_title(title, fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("chunk" if figure == "frechet" else "frame" if figure == "psnr" else "step", fontsize=8)
    axes.grid(True, color="0.9")


def _against_error(
    axes: Axes, report: Mapping[str, Any], figure: str, title: str, *, gap: bool = False
) -> None:  # fmt: skip
    for number, paradigm in enumerate(paradigms_of(report)):
        points = along_training(report, paradigm, figure, gap=gap)
        if not points:
            continue
        errors, means = ([point[name] for point in points] for name in ("error", "mean"))
        spread = [[point["mean"] - point["low"], point["high"] - point["mean"]] for point in points]
        axes.errorbar(errors, means, yerr=np.clip(spread, 0, None).T, fmt="-", color=f"C{number}", capsize=2,
                      label=_label(report, paradigm))  # fmt: skip
        faces = [f"C{number}" if point["follows"] else "white" for point in points]
        axes.scatter(errors, means, s=16, c=faces, edgecolors=f"C{number}", zorder=3)
    axes.invert_xaxis()  # training goes to the right
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("error in domain (held), falling to the right", fontsize=8)
    axes.grid(True, color="0.9")


def _measured(report: Mapping[str, Any]) -> list[str]:
    """The columns that this experiment has figures for."""
    return [figure for figure in COLUMNS if figure in report["runs"][0]["sets"]["held"]]


def _motion(report: Mapping[str, Any]) -> tuple[str, str]:
    """The figure of motion over time, and its title."""
    return ("still", "steps without motion") if "classifier" in report else ("motion", "optical flow")


def _label(report: Mapping[str, Any], paradigm: str) -> str:
    return paradigm + (" (inconclusive)" if follows_law(report, paradigm) is False else "")


def _means(report: Mapping[str, Any], paradigm: str, name: str, figure: str) -> list[float]:
    found = at_end(report, paradigm, name, figure)
    assert found is not None, "measured in every experiment"
    return found["mean"]


def _psnr_title(report: Mapping[str, Any]) -> str:
    return "the true frame" if "classifier" in report else "the image"


def _cell(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else shown(figure)


def _footnote(report: Mapping[str, Any]) -> str:
    parts = ["Brackets: 95% intervals over videos; of several seeds, the mean and the widest interval."]
    halves = report["runs"][0]["sets"]["held"].get("samples")
    if halves is not None:
        parts.append(f"Fréchet distances and their floor are those of halves: {halves} videos on each side.")
    if "classifier" in report:
        right = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in report["classifier"].items())
        chances = ", ".join(f"{SET_NAMES[name]} {real['chance']:.2f}" for name, real in report["real"].items())
        parts.append(f"The classifier on other real clips: {right}. A right step by chance: {chances}.")
    return " ".join(parts)


def _strip_png(frames_NTHWC: Any) -> str:
    """One row a video, frames beside each other, in base64."""
    frames = np.pad(
        frames_NTHWC, ((0, 0), (0, 0), (0, STRIP_GAP), (0, STRIP_GAP), (0, 0)), constant_values=255
    )
    count, length, height, width, _ = frames.shape
    picture = frames.transpose(0, 2, 1, 3, 4).reshape(count * height, length * width, 3)
    image = Image.fromarray(picture)
    buffer = io.BytesIO()
    image.resize((image.width * STRIP_ENLARGE, image.height * STRIP_ENLARGE), Image.Resampling.NEAREST).save(
        buffer, format="png"
    )
    return base64.b64encode(buffer.getvalue()).decode()
