"""Every paradigm trains over tensor, pipeline and context ranks as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.layouts import (
    Layout,
    assert_ranks_agree,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_weights,
    metrics,
    run_layouts,
)
from helpers.paradigms import PARADIGMS
from helpers.synthetic_data import write_synthetic

DIVIDED = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel")
CONTEXT = ("--context-parallel-size", "2")


# Samples of one microbatch, and microbatches of an iteration.
BATCHES = [(1, 4), *(pytest.param(batch, marks=pytest.mark.long) for batch in [(2, 1), (1, 1), (2, 4)])]


@pytest.fixture(scope="module", params=BATCHES, ids=lambda batch: "micro{}-x{}".format(*batch))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five iterations of each paradigm in one process, over TP 2 with SP x PP 2, and over CP 2; three launches."""
    micro, count = request.param
    folder = tmp_path_factory.mktemp("paradigms")
    data = write_synthetic(folder / "data", 6, (16, 3, 8, 12), 64, 32, seed=3,
                           inputs={"grey_clip": (16, 3, 8, 12), "image_rows": (5, 20)})
    layouts = []
    for name in PARADIGMS:
        layouts += [
            Layout(f"{name}-single", 1, ("--conditioning", name)),
            Layout(f"{name}-divided", 4, ("--conditioning", name, *DIVIDED)),
            Layout(f"{name}-context", 2, ("--conditioning", name, *CONTEXT)),
        ]
    common = ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", "5",
              "--seed", "7", "--micro-batch-size", str(micro), "--global-batch-size", str(micro * count),
              "--optimizer", "sgd", "--lr", "0.05", "--image-embed-dim", "20"]  # fmt: skip
    # And one that starts from text-to-video weights, which a launch before has trained.
    start = ("--conditioning", "inpainting", "--load-weights", f"megatron:{folder / 'text_to_video-single'}")
    layouts += [Layout("started-single", 1, start), Layout("started-divided", 4, (*start, *DIVIDED))]
    return run_layouts(layouts, folder, common)


@pytest.mark.parametrize("name, layout", [
    *((name, layout) for name in PARADIGMS for layout in ("divided", "context")), ("started", "divided"),
])
def test_divided_paradigm_trains_like_one_process(runs: dict[str, Path], name: str, layout: str) -> None:
    divided, single = runs[f"{name}-{layout}"], runs[f"{name}-single"]
    assert len(metrics(divided)) == 5
    assert_same_metrics(divided, single)
    assert_same_gradients(divided, single)
    assert_same_weights(divided, single)
    assert_ranks_agree(divided)
