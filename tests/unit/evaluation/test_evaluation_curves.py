"""Curves of training: reading metrics, smoothing, and what the figure shows."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.evaluation.curves import (
    draw_training_curves,
    read_metrics,
    smooth,
    write_training_curves,
)


def write_metrics(path, losses, torn=""):
    rows = [
        {"iteration": number, "consumed_samples": number, "loss": loss, "grad_norm": 2 * loss, "lr": 1e-4}
        for number, loss in enumerate(losses, start=1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return path


def test_smoothing_is_a_centred_mean_cut_at_the_ends():
    values = np.array([0.0, 3.0, 6.0, 0.0, 9.0])
    assert smooth(values, 1).tolist() == values.tolist()
    assert smooth(values, 2).tolist() == [1.5, 4.5, 3.0, 4.5, 9.0]
    assert smooth(values, 3).tolist() == [1.5, 3.0, 3.0, 5.0, 4.5]
    assert smooth(values, 99).tolist() == [3.6] * 5
    with pytest.raises(ValueError, match="window is 0"):
        smooth(values, 0)


def test_torn_last_line_is_passed_over(tmp_path):
    rows = read_metrics(write_metrics(tmp_path / "metrics.jsonl", [3.0, 2.0], torn='{"iteration": 3, "lo'))
    assert [row["loss"] for row in rows] == [3.0, 2.0]


@pytest.mark.parametrize("text", ["", "\n"])
def test_missing_and_empty_metrics_are_the_users_error(text, tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match="holds no metrics"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_figure_has_raw_and_smoothed_lines_of_every_run(tmp_path):
    losses = np.linspace(2.0, 1.0, 60)
    runs = {
        "first": write_metrics(tmp_path / "a.jsonl", losses),
        "second": write_metrics(tmp_path / "b.jsonl", losses[:40] / 2),
    }
    figure = draw_training_curves(runs, title="two runs", window=5, marks={30: "resumed"})
    loss, grad_norm, lr = figure.axes
    assert figure.get_suptitle() == "two runs"
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss (global batch mean)",
        "gradient norm",
        "learning rate",
    ]
    raw, smoothed = loss.get_lines()[:2]
    assert np.array_equal(raw.get_xdata(), np.arange(1, 61)) and np.array_equal(raw.get_ydata(), losses)
    assert np.allclose(smoothed.get_ydata(), smooth(losses, 5))
    assert len(loss.get_lines()) == 5  # two per run, and the mark
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "first (mean over 5)",
        "second (mean over 5)",
    ]
    assert np.allclose(grad_norm.get_lines()[0].get_ydata(), 2 * losses)
    assert set(lr.get_lines()[0].get_ydata()) == {1e-4}


def test_values_that_are_not_finite_leave_the_rest_of_the_curve(tmp_path):
    figure = draw_training_curves({"run": write_metrics(tmp_path / "a.jsonl", [2.0, float("nan"), 1.0])})
    raw = figure.axes[0].get_lines()[0]
    assert raw.get_xdata().tolist() == [1.0, 3.0] and raw.get_ydata().tolist() == [2.0, 1.0]


def test_png_is_written_without_pyplot(tmp_path):
    import sys

    before = "matplotlib.pyplot" in sys.modules
    write_training_curves(
        {"run": write_metrics(tmp_path / "a.jsonl", [2.0, 1.5, 1.0])}, tmp_path / "new" / "loss.png"
    )
    assert ("matplotlib.pyplot" in sys.modules) is before
    with Image.open(tmp_path / "new" / "loss.png") as picture:
        assert picture.format == "PNG" and picture.width > 800
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="no run"):
        draw_training_curves({})
