"""Whatever the layout, the run is the same: losses, gradient norms, gradients and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layouts import (
    Layout,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_weights,
    metrics,
    run_layouts,
    weights,
)
from helpers.synthetic_data import write_synthetic

pytestmark = pytest.mark.timeout(3600)  # the first test that needs a run makes all of its kind

TP, PP, SP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--sequence-parallel"
CP, ALGO = "--context-parallel-size", "--context-parallel-algo"
VIRTUAL = ("--num-virtual-stages-per-pipeline-rank", "2")
LAYOUTS = [
    Layout("tp2", 2, (TP, "2")),
    Layout("tp2-sp", 2, (TP, "2", SP)),
    Layout("tp4", 4, (TP, "4")),
    Layout("tp4-sp", 4, (TP, "4", SP)),
    Layout("pp2", 2, (PP, "2")),
    Layout("pp4", 4, (PP, "4")),
    Layout("pp2-virtual2", 2, (PP, "2", *VIRTUAL)),
    Layout("pp3-uneven", 3, (PP, "3")),
    Layout("cp2-ulysses", 2, (CP, "2")),
    Layout("cp2-ring", 2, (CP, "2", ALGO, "ring")),
    Layout("cp4-usp", 4, (CP, "4", ALGO, "usp", "--ulysses-degree", "2")),
    Layout("cp3-padded", 3, (CP, "3", ALGO, "ring")),  # 40 tokens
    Layout("dp2", 2, replicas=2),
    Layout("dp2-overlap", 2, ("--overlap-grad-reduce",), replicas=2),
    Layout("tp2-pp2", 4, (TP, "2", PP, "2")),
    Layout("tp2-cp2", 4, (TP, "2", CP, "2")),
    Layout("tp2-sp-cp2", 4, (TP, "2", SP, CP, "2", ALGO, "ring")),
    Layout("pp2-cp2", 4, (PP, "2", CP, "2")),
    Layout("tp2-pp2-cp2", 8, (TP, "2", SP, PP, "2", CP, "2")),
    Layout("dp2-tp2-pp2", 8, (TP, "2", SP, PP, "2"), replicas=2),
]
OVERLAP = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
SGD = ("--optimizer", "sgd", "--lr", "0.05")
# Samples of one microbatch, and microbatches of an iteration; the first two in the default tier.
BATCHES = [(2, 1), (1, 4), (1, 1), (2, 4)]
ITERATIONS = 10


def common_flags(data: Path, iterations: int = 5) -> list[str]:
    return ["--model", "tiny", "--data-path", str(data), "--device", "cpu", "--train-iters", str(iterations),
            "--seed", "7", "--lr-warmup-iters", "0"]


def batch_flags(micro: int, whole: int) -> tuple[str, ...]:
    return "--micro-batch-size", str(micro), "--global-batch-size", str(whole)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of 2 x 4 x 5 tokens, a number that 3 does not divide."""
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 6, (16, 2, 8, 10), 64, 32, seed=3)


def microbatches(layout: Layout, micro: int, count: int) -> int:
    """As many as asked for; the interleaved schedule needs one for each pipeline rank."""
    return max(count, 2) if "--num-virtual-stages-per-pipeline-rank" in layout.flags else count


def case_name(layout: Layout, micro: int, count: int) -> str:
    return f"{layout.name}-micro{micro}-x{microbatches(layout, micro, count)}"


class SgdRuns:
    """Runs of all layouts for one size of microbatch and one accumulation, with the single-process runs beside them."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.saves: dict[str, Path] = {}

    def compare(self, layout: Layout, micro: int, count: int) -> tuple[Path, Path]:
        """The ``--save`` folders of a layout's run and of the single process with the same global batch."""
        if case_name(layout, micro, count) not in self.saves:
            self._run(micro, count)
        return self.saves[case_name(layout, micro, count)], self.saves[f"single-{self._whole(layout, micro, count)}"]

    def _whole(self, layout: Layout, micro: int, count: int) -> int:
        return micro * microbatches(layout, micro, count) * layout.replicas

    def _run(self, micro: int, count: int) -> None:
        layouts = []
        for whole in {self._whole(layout, micro, count) for layout in LAYOUTS}:
            if f"single-{whole}" not in self.saves:
                layouts.append(Layout(f"single-{whole}", 1, batch_flags(2 if whole % 2 == 0 else 1, whole)))
        for layout in LAYOUTS:
            flags = (*layout.flags, *batch_flags(micro, self._whole(layout, micro, count)))
            layouts.append(Layout(case_name(layout, micro, count), layout.world, flags))
        self.saves |= run_layouts(layouts, self.folder, [*common_flags(self.data, ITERATIONS), *SGD], timeout=1800)


@pytest.fixture(scope="module")
def sgd_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SgdRuns:
    return SgdRuns(tmp_path_factory.mktemp("sgd"), data)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("micro, count", [
    batch if index < 2 else pytest.param(*batch, marks=pytest.mark.long) for index, batch in enumerate(BATCHES)
])
def test_layout_trains_like_one_process(sgd_runs: SgdRuns, layout: Layout, micro: int, count: int) -> None:
    run, single = sgd_runs.compare(layout, micro, count)
    assert len(metrics(run)) == ITERATIONS
    assert_same_metrics(run, single)
    assert_same_gradients(run, single)
    assert_same_weights(run, single)


def test_the_reference_run_learns(sgd_runs: SgdRuns) -> None:
    _, single = sgd_runs.compare(LAYOUTS[0], *BATCHES[0])
    losses = [row["loss"] for row in metrics(single)]
    assert len(set(losses)) == ITERATIONS
    assert losses[0] == pytest.approx(2.0, rel=0.2)  # a zero head predicts 0 for noise - latents of unit variance


@pytest.fixture(scope="module")
def adam_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """AdamW in one process; with the distributed optimizer; and halves of runs that go on at another layout."""
    folder = tmp_path_factory.mktemp("adam")
    first, second = ("--exit-interval", "2"), lambda name: ("--load", str(folder / name))
    layouts = [
        Layout("single", 1),
        Layout("tp2-sp-half", 2, (TP, "2", SP, *first)),
        Layout("pp2-rest", 2, (PP, "2", *second("tp2-sp-half"))),
        Layout("distributed-optimizer", 2, ("--use-distributed-optimizer",)),
        Layout("distributed-optimizer-half", 2, ("--use-distributed-optimizer", *first)),
        Layout("tp2-rest", 2, (TP, "2", *second("distributed-optimizer-half"))),
        Layout("bf16", 1, ("--bf16",)),
        Layout("bf16-tp2-sp", 2, (TP, "2", SP, "--bf16")),
        Layout("bf16-pp2", 2, (PP, "2", "--bf16")),
        Layout("overlap", 2, OVERLAP),
        Layout("overlap-half", 2, (*OVERLAP, *first)),
        Layout("overlap-rest", 2, (*OVERLAP, *second("overlap-half"))),
    ]
    return run_layouts(layouts, folder, [*common_flags(data), *batch_flags(2, 4), "--lr", "1e-3"])


@pytest.mark.parametrize("name", ["distributed-optimizer", "overlap"])
def test_distributed_optimizer_trains_like_one_process(adam_runs: dict[str, Path], name: str) -> None:
    assert_same_metrics(adam_runs[name], adam_runs["single"])


@pytest.mark.parametrize("name, reference, relative", [
    ("bf16", "single", 5e-3), ("bf16-tp2-sp", "bf16", 2e-3), ("bf16-pp2", "bf16", 2e-3),
])
def test_bf16_stays_near(adam_runs: dict[str, Path], name: str, reference: str, relative: float) -> None:
    assert_same_metrics(adam_runs[name], adam_runs[reference], relative)


def test_overlapped_gather_saves_the_updated_weights(adam_runs: dict[str, Path]) -> None:
    found, expected = weights(adam_runs["overlap"]), weights(adam_runs["distributed-optimizer"])
    assert all(torch.equal(found[name], want) for name, want in expected.items())


@pytest.mark.parametrize("half, rest", [
    ("tp2-sp-half", "pp2-rest"), ("distributed-optimizer-half", "tp2-rest"), ("overlap-half", "overlap-rest"),
])
def test_resume_at_another_layout_continues_the_run(adam_runs: dict[str, Path], half: str, rest: str) -> None:
    rows, expected = metrics(adam_runs[half]) + metrics(adam_runs[rest]), metrics(adam_runs["single"])
    assert [row["consumed_samples"] for row in rows] == [row["consumed_samples"] for row in expected]
    for row, want in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert row["lr"] == want["lr"]
