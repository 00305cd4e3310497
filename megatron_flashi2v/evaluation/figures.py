"""Curves and strips of frames for the report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE_COLOUR = "0.45"
TILE_WIDTH = 144
"""Pixels of a frame in a strip."""
COLUMNS = 8


def chunk_figure(evaluations: Sequence[Mapping[str, Any]]) -> bytes:
    """Frechet distance and MMD of each chunk, and the distance of halves beside the references' own."""
    figure = _figure(3)
    frechet, mmd, half = figure.subplots(1, 3)
    for number, evaluation in enumerate(evaluations):
        chunks, colour, label = evaluation["chunks"], f"C{number}", _label(evaluation)
        places = [chunk["first_frame"] for chunk in chunks]
        frechet.plot(places, _column(chunks, "frechet"), "o-", color=colour, label=label)
        _band(half, places, [chunk["halves"] for chunk in chunks], "videos", colour, label)
        values = _column(chunks, "mmd")
        low, high = _column(chunks, "mmd_low"), _column(chunks, "mmd_high")
        mmd.plot(places, values, "o-", color=colour, label=label)
        mmd.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    halves = [chunk["halves"] for chunk in evaluations[0]["chunks"]]
    places = [chunk["first_frame"] for chunk in evaluations[0]["chunks"]]
    _band(half, places, halves, "references", REFERENCE_COLOUR, "references")
    mmd.axhline(0, color=REFERENCE_COLOUR, linewidth=1)
    pairs, count = evaluations[0]["settings"]["pairs"], halves[0]["samples"]
    across = "first frame of the chunk"
    _finish(frechet, f"Fréchet distance, {pairs} pairs", across, places)
    _finish(mmd, "squared MMD, 95% interval", across, places)
    _finish(half, f"Fréchet distance, {count} images against {count} others", across, places)
    for axes in (frechet, half):
        axes.set_ylim(bottom=0)
    return _png(figure)


def fidelity_figure(evaluations: Sequence[Mapping[str, Any]]) -> bytes:
    """PSNR, SSIM and similarity of features to the condition, over time."""
    figure = _figure(3)
    panels = [("psnr", "PSNR to the image, dB"), ("ssim", "SSIM to the image"), ("similarity", "feature similarity")]
    for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, evaluation in enumerate(evaluations):
            fidelity = evaluation["fidelity"]
            frames = fidelity["similarity_frames" if name == "similarity" else "frames"]
            _curve(axes, frames, fidelity[name]["videos"], f"C{number}", _label(evaluation))
        fidelity = evaluations[0]["fidelity"]
        frames = fidelity["similarity_frames" if name == "similarity" else "frames"]
        # A reference's frame 0 is the image itself.
        later = {bound: values[1:] for bound, values in fidelity[name]["references"].items()}
        _curve(axes, frames[1:], later, REFERENCE_COLOUR, "references")
        _finish(axes, title, "frame")
    return _png(figure)


def motion_figure(evaluations: Sequence[Mapping[str, Any]]) -> bytes:
    """Optical flow and differences between frames, over time."""
    figure = _figure(2)
    panels = [
        ("flow", "optical flow, % of the longer side", 100.0),
        ("differences", "difference to the frame before, 8-bit levels", 1.0),
    ]
    for axes, (name, title, factor) in zip(figure.subplots(1, 2), panels, strict=True):
        curves = [(motion["motion"][name]["videos"], f"C{number}", _label(motion))
                  for number, motion in enumerate(evaluations)]  # fmt: skip
        curves.append((evaluations[0]["motion"][name]["references"], REFERENCE_COLOUR, "references"))
        for curve, colour, label in curves:
            scaled = {bound: [value * factor for value in values] for bound, values in curve.items()}
            _curve(axes, evaluations[0]["motion"]["frames"], scaled, colour, label)
        _finish(axes, title, "frame")
        axes.set_ylim(bottom=0)
    return _png(figure)


def diversity_figure(diversity: Mapping[str, Any]) -> bytes:
    """Differences between seeds, over time."""
    figure = _figure(2)
    pixels, features = figure.subplots(1, 2)
    _curve(pixels, diversity["frames"], diversity["pixels"], "C0", "between seeds")
    _finish(pixels, "RMS difference, 8-bit levels", "frame")
    places = diversity["first_frames"]
    _curve(features, places, diversity["features"], "C0", "between seeds")
    features.plot(places, diversity["features_between_images"], "s--", color=REFERENCE_COLOUR, label="between images")
    _finish(features, "distance of features", "first frame of the chunk", places)
    for axes in (pixels, features):
        axes.set_ylim(bottom=0)
    return _png(figure)


def strip(frames_THWC: torch.Tensor) -> bytes:
    """At most eight frames side by side, evenly spread, the first and the last among them."""
    from PIL import Image

    count = min(COLUMNS, len(frames_THWC))
    chosen = np.linspace(0, len(frames_THWC) - 1, count).round().astype(int)
    height, width = frames_THWC.shape[1:3]
    size = (TILE_WIDTH, max(1, round(TILE_WIDTH * height / width)))
    # Small frames are enlarged without smoothing, so that each pixel can be judged.
    method = Image.Resampling.NEAREST if width < TILE_WIDTH else Image.Resampling.LANCZOS
    tiles: list[NDArray[np.uint8]] = [
        np.asarray(Image.fromarray(frames_THWC[place].contiguous().numpy()).resize(size, method)) for place in chosen
    ]
    gap = np.full((size[1], 3, 3), 255, dtype=np.uint8)
    parts = [part for tile in tiles for part in (tile, gap)][:-1]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(parts, axis=1)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _figure(panels: int) -> Figure:
    # The object interface (no pyplot): no global figure list, no backend that wants a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4.6 * panels, 3.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _curve(
    axes: Axes, places: Sequence[int], curve: Mapping[str, Sequence[float]], colour: str, label: str
) -> None:
    axes.plot(places, curve["mean"], "o-", color=colour, label=label, markersize=3)
    axes.fill_between(places, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)


def _band(
    axes: Axes, places: Sequence[int], halves: Sequence[Mapping[str, float]], side: str, colour: str, label: str
) -> None:
    axes.plot(places, _column(halves, side), "o-", color=colour, label=label, markersize=3)
    low, high = _column(halves, f"{side}_low"), _column(halves, f"{side}_high")
    axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)


def _finish(axes: Axes, title: str, across: str, places: Sequence[int] | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=11)
    axes.set_xlabel(across)
    if places is not None and len(places) <= 12:
        axes.set_xticks(list(places))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)


def _label(evaluation: Mapping[str, Any]) -> str:
    # A leading underscore hides a label, and dollars begin a formula, which may be malformed.
    return str(evaluation["name"]).lstrip("_").replace("$", r"\$")[:40] or "videos"


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
