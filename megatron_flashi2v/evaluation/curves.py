"""Curves of training: loss, learning rate and gradient norm of one run or of several, and a run's evaluations."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.runtime.files import atomic_write_bytes, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (("loss", "loss (global batch mean)"), ("grad_norm", "gradient norm"), ("lr", "learning rate"))
SMOOTHED = ("loss", "grad_norm")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, in the file's order.

    A last line that a killed run left torn is passed over.

    Raises:
        DataError: the file is missing, holds no row, or a line other than the last is not a JSON object.
    """
    rows = read_jsonl(path, error=DataError)
    if not rows:
        raise DataError(f"{path}: holds no metrics; the run has not finished an iteration yet")
    return rows


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred moving mean; near the ends the window is cut to what exists, so the length stays."""
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    before, after = (window - 1) // 2, window // 2
    cumulative = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    start = np.clip(np.arange(len(values)) - before, 0, len(values))
    stop = np.clip(np.arange(len(values)) + after + 1, 0, len(values))
    return (cumulative[stop] - cumulative[start]) / (stop - start)


def write_training_curves(
    runs: Mapping[str, Path],
    path: Path,
    *,
    title: str | None = None,
    window: int | None = None,
    marks: Mapping[int, str] | None = None,
) -> None:
    """Write :func:`draw_training_curves` as a PNG, atomically.

    Raises:
        UserError: a metrics file is missing or holds no row, or the PNG cannot be written.
    """
    buffer = io.BytesIO()
    draw_training_curves(runs, title=title, window=window, marks=marks).savefig(buffer, format="png")
    atomic_write_bytes(path, buffer.getvalue())


def draw_training_curves(
    runs: Mapping[str, Path],
    *,
    title: str | None = None,
    window: int | None = None,
    marks: Mapping[int, str] | None = None,
) -> Figure:
    """One figure with the curves of some runs: loss above, gradient norm and learning rate below.

    Args:
        runs: label -> ``metrics.jsonl``; one colour per run.
        title: headline of the figure.
        window: iterations in the moving mean (by default 1/20 of the run, at least 1).
        marks: iteration -> note, drawn as vertical lines on the loss (where a run was resumed, for instance).

    Returns:
        A figure with the Agg canvas; its axes are loss, gradient norm and learning rate.

    Raises:
        DataError: a file is missing or holds no row.
        ValueError: no run was given.
    """
    if not runs:
        raise ValueError("no run to plot")
    # The object interface (no pyplot): no global figure list, no backend that wants a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = _panels(figure)
    for number, (label, metrics) in enumerate(runs.items()):
        rows = read_metrics(metrics)
        for name, _ in PANELS:
            _draw(axes[name], rows, name, label=label, colour=f"C{number % 10}", window=window)
    for iteration, note in (marks or {}).items():
        axes["loss"].axvline(iteration, color="0.5", linewidth=1, linestyle="--")
        axes["loss"].annotate(
            note,
            (iteration, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="right",
            fontsize=8,
            color="0.35",
        )
    axes["loss"].legend(frameon=False)
    if title:
        figure.suptitle(title)
    return figure


EVALUATION_PANELS = (
    ("psnr", "PSNR to the image, dB"), ("ssim", "SSIM to the image"), ("similarity", "feature similarity to the image"),
    ("flow", "optical flow, share of the longer side"), ("differences", "difference between frames, 8-bit levels"),
    ("frozen", "share of frozen videos"),
)


def write_evaluation_curves(figures: Mapping[int, Mapping[str, Mapping[str, float] | None]], path: Path) -> None:
    """Write the figures of ``evaluation/iter_*.json`` over iterations as a PNG, atomically.

    Args:
        figures: of each iteration, by name, with ``mean``, ``low`` and ``high``; those of the references, where there
            are any, are drawn dashed.
        path: the PNG.

    Raises:
        WriteError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, EVALUATION_PANELS, strict=True):
        for key, label, style in ((name, "videos", "o-C0"), (f"reference_{name}", "references", "--C7")):
            points = [(iteration, row.get(key)) for iteration, row in sorted(figures.items())]
            drawn = [(iteration, point) for iteration, point in points if point and point["mean"] is not None]
            if drawn:
                iterations = [iteration for iteration, _ in drawn]
                axes.plot(iterations, [point["mean"] for _, point in drawn], style, markersize=3, label=label)
                bounds = ([point[bound] for _, point in drawn] for bound in ("low", "high"))
                axes.fill_between(iterations, *bounds, color=style[-2:], alpha=0.12, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("iteration")
        axes.grid(True, color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
    figure.axes[0].legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write_bytes(path, buffer.getvalue())


def _panels(figure: Figure) -> dict[str, Axes]:
    """The loss over the full width, the two smaller panels under it, all with one iteration axis."""
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    loss = figure.add_subplot(grid[0, :])
    axes = {
        "loss": loss,
        "grad_norm": figure.add_subplot(grid[1, 0], sharex=loss),
        "lr": figure.add_subplot(grid[1, 1], sharex=loss),
    }
    for name, label in PANELS:
        axes[name].set_ylabel(label)
        axes[name].set_xlabel("iteration")
        axes[name].grid(True, color="0.9", linewidth=0.7)
        axes[name].set_axisbelow(True)
        axes[name].ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    return axes


def _draw(
    axes: Axes, rows: list[dict[str, Any]], name: str, *, label: str, colour: str, window: int | None
) -> None:
    """One quantity of one run: raw points, and a moving mean over them where noise hides the trend."""
    points = [
        (row["iteration"], row[name]) for row in rows if "iteration" in row and row.get(name) is not None
    ]
    # A diverged run writes NaN or infinity; the mean over them would blank the rest of the curve.
    points = [(iteration, value) for iteration, value in points if np.isfinite(value)]
    if not points:
        axes.plot([], [], color=colour, label=label)
        return
    iterations, values = (np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))
    if name not in SMOOTHED:
        axes.plot(iterations, values, color=colour, linewidth=1.6, label=label)
        return
    width = window or max(1, len(values) // 20)
    axes.plot(iterations, values, ".", color=colour, markersize=3, alpha=0.35)
    axes.plot(
        iterations,
        smooth(values, width),
        color=colour,
        linewidth=1.8,
        label=f"{label} (mean over {width})" if width > 1 else label,
    )
