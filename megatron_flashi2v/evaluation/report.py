"""``report.html``: an evaluation on one page without other files."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_flashi2v.evaluation.figures import (
    chunk_figure,
    diversity_figure,
    fidelity_figure,
    motion_figure,
    strip,
)
from megatron_flashi2v.evaluation.outputs import GENERATOR
from megatron_flashi2v.evaluation.pairs import Pairing
from megatron_flashi2v.evaluation.videos import read_frames
from megatron_flashi2v.runtime.files import atomic_write_text

ROWS = 200
"""Videos listed in the page; all of them stand in evaluation.json."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{{ generator }}
<title>Evaluation of {{ main.name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: 3px 9px; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
img { max-width: 100%; height: auto }
figure { margin: 1em 0 } figcaption { font-size: 13px; color: #555; overflow-wrap: anywhere }
.note { color: #555 } .low { color: #b00020; font-weight: 600 }
</style>
</head>
<body>
<h1>Evaluation of {{ main.name }}</h1>
<p>{{ main.videos.videos_count }} videos of {{ main.videos.references_count }} images against as many references:
{{ main.videos.frames }} frames of {{ main.videos.width }} x {{ main.videos.height }} pixels, paired by
{{ "name" if main.videos.pairing == "names" else "the order of their names" }}.</p>
<table>
<tr><th></th>{% for one in all %}<th>{{ one.name }}</th>{% endfor %}</tr>
{% for label, values in overview %}
<tr><td>{{ label }}</td>{% for value in values %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>

<h2>{{ main.measure }}, chunk by chunk</h2>
{{ picture(figures.chunks, "distances by chunk") }}
<p class="note">{{ main.settings.pairs }} videos against {{ main.settings.pairs }} references;
{{ main.settings.features.width }} features a chunk of {{ main.settings.chunks.frames }} frames. The Fréchet distance is
too high at any finite number of samples. How much, the right panel shows: one half of the images against the other,
{{ main.chunks[0].halves.samples }} on each side, by their videos and by the references themselves (shaded: 95% of
random halvings). The MMD has no such bias; 0 means that nothing tells the videos from the references.</p>
{% if main.settings.pairs < main.settings.features.width %}
<p class="low">Fewer videos than features: the Fréchet distance is far too high. Rely on the MMD.</p>
{% endif %}
<table>
<tr><th></th><th>frames</th><th>Fréchet</th><th>halves: videos</th><th>halves: references</th><th>MMD</th>
<th>95% interval</th></tr>
{% for one in all %}{% for chunk in one.chunks %}
<tr><td>{{ one.name }}</td><td class="n">{{ chunk.first_frame }} to {{ chunk.last_frame }}</td>
<td class="n">{{ number(chunk.frechet) }}</td><td class="n">{{ number(chunk.halves.videos) }}</td>
<td class="n">{{ number(chunk.halves.references) }}</td><td class="n">{{ number(chunk.mmd) }}</td>
<td class="n">{{ number(chunk.mmd_low) }} to {{ number(chunk.mmd_high) }}</td></tr>
{% endfor %}{% endfor %}
</table>

<h2>Fidelity to the condition image</h2>
{{ picture(figures.fidelity, "fidelity over time") }}
<p class="note">Each frame against frame 0 of the reference. Shaded: 95% intervals of the mean over images. A curve that
stays above the references' has kept the image instead of moving on.</p>

<h2>Motion</h2>
{{ picture(figures.motion, "motion over time") }}
<p class="note">From each frame to the next. A video is frozen if its optical flow is less than
{{ main.settings.flow.frozen_below }} of its reference's. Differences between frames count flicker and noise as motion,
optical flow does not.</p>

{% if main.diversity %}
<h2>Diversity over seeds</h2>
{{ picture(figures.diversity, "diversity over time") }}
<p class="note">{{ main.diversity.images }} images have several seeds.</p>
{% endif %}

{% if strips %}
<h2>Frames</h2>
{% for row in strips %}
<figure>{{ picture(row.reference, row.name + ", reference") }}<br>{{ picture(row.video, row.name) }}
<figcaption>above the reference, below {{ row.name }}: {{ row.text }}</figcaption></figure>
{% endfor %}
{% endif %}

<h2>Videos</h2>
<p class="note">The {{ rows|length }} of {{ main.pairs|length }} that move least beside their references.</p>
<table>
<tr><th>video</th><th>reference</th><th>flow / reference's</th><th>flow, %</th><th>PSNR first, dB</th>
<th>PSNR last, dB</th><th>SSIM first</th><th>SSIM last</th></tr>
{% for row in rows %}
<tr><td>{{ row.video }}</td><td>{{ row.reference }}</td>
<td class="n{{ " low" if row.flow_ratio is not none and row.flow_ratio < main.settings.flow.frozen_below }}">
{{ number(row.flow_ratio) }}</td><td class="n">{{ number(100 * row.flow) }}</td>
<td class="n">{{ number(row.psnr_first) }}</td><td class="n">{{ number(row.psnr_last) }}</td>
<td class="n">{{ number(row.ssim_first) }}</td><td class="n">{{ number(row.ssim_last) }}</td></tr>
{% endfor %}
</table>

<h2>Settings</h2>
<pre>{{ settings }}</pre>
</body>
</html>
"""


def write_report(
    path: Path, evaluation: Mapping[str, Any], beside: Sequence[Mapping[str, Any]], pairing: Pairing, strips: int
) -> None:
    """Write the page.

    Args:
        path: of the page.
        evaluation: the contents of ``evaluation.json``.
        beside: of earlier evaluations with the same settings, drawn in the same curves.
        pairing: the files, some of which are shown frame by frame.
        strips: how many.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    every = [evaluation, *beside]
    figures = {"chunks": chunk_figure(every), "fidelity": fidelity_figure(every), "motion": motion_figure(every)}
    if evaluation["diversity"] is not None:
        figures["diversity"] = diversity_figure(evaluation["diversity"])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(PAGE).render(
        generator=Markup(GENERATOR),
        main=evaluation,
        all=every,
        overview=_overview(every),
        figures=figures,
        strips=_strips(evaluation, pairing, strips),
        rows=_least_moving(evaluation)[:ROWS],
        settings=json.dumps({"settings": evaluation["settings"], "versions": evaluation["versions"]}, indent=2,
                            ensure_ascii=False),
        picture=_picture,
        number=_number,
    )  # fmt: skip
    atomic_write_text(path, page)


def _overview(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The few figures to read first, one column an evaluation."""

    def row(label: str, value: Any) -> tuple[str, list[str]]:
        return label, [value(one) for one in evaluations]

    def mean(values: Sequence[float]) -> str:
        return _number(sum(values) / len(values))

    return [
        row("Fréchet distance, first chunk", lambda one: _number(one["chunks"][0]["frechet"])),
        row("Fréchet distance, last chunk", lambda one: _number(one["chunks"][-1]["frechet"])),
        row("MMD, mean over chunks", lambda one: mean([chunk["mmd"] for chunk in one["chunks"]])),
        row("PSNR of frame 0, dB", lambda one: _number(one["fidelity"]["psnr"]["videos"]["mean"][0])),
        row("SSIM of the last frame", lambda one: _number(one["fidelity"]["ssim"]["videos"]["mean"][-1])),
        row("SSIM of the references' last frame",
            lambda one: _number(one["fidelity"]["ssim"]["references"]["mean"][-1])),
        row("flow beside the reference's", lambda one: _interval(one["motion"]["flow_ratio"], "mean")),
        row("frozen videos", lambda one: _interval(one["motion"]["frozen"], "share")),
    ]  # fmt: skip


def _strips(evaluation: Mapping[str, Any], pairing: Pairing, count: int) -> list[dict[str, Any]]:
    """Videos with their references: evenly spread, and in the last third of the places those that move least."""
    rows = list(evaluation["pairs"])
    files = {path.name: (group.reference, path) for group in pairing.groups for path in group.videos}
    spread = min(len(rows), count - count // 3)
    chosen = [rows[place * len(rows) // spread] for place in range(spread)] if spread else []
    chosen += [row for row in _least_moving(evaluation) if row not in chosen][: count // 3]
    shown = []
    for row in chosen:
        reference, video = files[row["video"]]
        text = f"flow {_number(row['flow_ratio'])} of its reference's, PSNR of frame 0 {_number(row['psnr_first'])} dB"
        shown.append({"name": row["video"], "reference": strip(read_frames(reference)),
                      "video": strip(read_frames(video)), "text": text})  # fmt: skip
    return shown


def _least_moving(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Videos by their flow beside the reference's; those whose reference does not move come last."""
    def order(row: Mapping[str, Any]) -> float:
        return float("inf") if row["flow_ratio"] is None else row["flow_ratio"]

    return sorted(evaluation["pairs"], key=order)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _interval(value: Mapping[str, float | None] | None, name: str) -> str:
    if value is None or value[name] is None:
        return "none"
    return f"{_number(value[name])} [{_number(value['low'])}, {_number(value['high'])}]"


def _picture(data: bytes, what: str) -> Any:
    from markupsafe import Markup

    text = base64.b64encode(data).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(what, text)
