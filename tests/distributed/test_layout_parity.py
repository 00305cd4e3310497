"""Whatever the layout, the run is the same: losses, gradient norms, gradients and weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.layouts import (
    Layout,
    assert_ranks_agree,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_velocity,
    assert_same_weights,
    metrics,
    run_layouts,
    tensors,
    weights,
)
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.checkpoint.folders import find_checkpoint

TP, PP, SP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--sequence-parallel"
CP, ALGO = "--context-parallel-size", "--context-parallel-algo"
VIRTUAL = ("--num-virtual-stages-per-pipeline-rank", "2")
DISTRIBUTED = "--use-distributed-optimizer"
OVERLAP = (DISTRIBUTED, "--overlap-grad-reduce", "--overlap-param-gather")
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
    # megatron-core's distributed optimizer takes Adam only.
    Layout("dp2-distributed", 2, (DISTRIBUTED,), replicas=2),
    Layout("tp2-sp-dp2-overlap", 4, (TP, "2", SP, *OVERLAP), replicas=2),
    Layout("cp2-dp2-overlap", 4, (CP, "2", *OVERLAP), replicas=2),
    Layout("pp2-virtual2-dp2-overlap", 4, (PP, "2", *VIRTUAL, *OVERLAP), replicas=2),
]
# Those of the default tier: each kind of division, alone or in the combination that exercises most of it.
DEFAULT = (
    "tp2-sp", "tp4", "pp2-virtual2", "pp3-uneven", "cp2-ulysses", "cp3-padded", "dp2-overlap", "tp2-sp-cp2",
    "tp2-pp2-cp2", "dp2-distributed", "tp2-sp-dp2-overlap", "pp2-virtual2-dp2-overlap",
)
BF16_DEFAULT = ("pp2-virtual2", "cp2-ring", "tp2-pp2", "tp2-sp-dp2-overlap")
# The layout on which a planted bug shows in what rank 0 saves; and one that shows only between ranks.
SPOILED = {
    "norm_weights": (TP, "2", SP),
    "modulation": (TP, "2", SP),
    "text_rows": (PP, "2"),
    "noise_keys": (),
    "ring_merge": (CP, "2", ALGO, "ring"),
}
# The norms lie around 0.33: some are clipped, and some move the threshold.
ADAPTIVE = ("--clip-grad-method", "adaptive-npu", "--clip-grad", "0.33", "--clip-grad-ema-decay", "0.5")
SGD = ("--optimizer", "sgd", "--lr", "0.05")
ADAM = ("--optimizer", "adam", "--lr", "1e-4", "--adam-eps")
OPTIMIZERS = {
    "sgd": SGD,
    "adam": (*ADAM, "1e-8"),
    # The text's gradients are so small that Adam makes steps of their rounding, unless epsilon is larger.
    "damped-adam": (*ADAM, "1e-5"),
}
# Samples of one microbatch, and microbatches of an iteration; the first in the default tier.
BATCHES = [(1, 4), (2, 1), (1, 1), (2, 4)]
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


def microbatches(layout: Layout, count: int) -> int:
    """As many as asked for; the interleaved schedule needs one for each pipeline rank."""
    return max(count, 2) if "--num-virtual-stages-per-pipeline-rank" in layout.flags else count


def is_distributed(layout: Layout) -> bool:
    return DISTRIBUTED in layout.flags


def optimizer_of(layout: Layout) -> str:
    """By name; plain replicas round least."""
    return "sgd" if not is_distributed(layout) else "damped-adam" if set(OVERLAP) <= set(layout.flags) else "adam"


class Runs:
    """Runs of layouts, made when one is asked for, and the single-process runs to compare them with."""

    def __init__(self, folder: Path, data: Path, *flags: str) -> None:
        self.folder, self.common = folder, [*common_flags(data, ITERATIONS), *flags]
        self.saves: dict[str, Path] = {}

    def compare(self, layout: Layout, micro: int, count: int, together: list[Layout]) -> tuple[Path, Path]:
        """The ``--save`` folders of a layout's run and of the single process with the same global batch.

        Args:
            layout: to be compared.
            micro: samples of one microbatch.
            count: microbatches of an iteration.
            together: layouts that are run in the same launches.
        """
        run, single = self._run(layout, micro, count), self._single(layout, micro, count)
        if run.name not in self.saves:
            wanted = {of(other, micro, count) for other in together for of in (self._single, self._run)}
            missing = [other for other in wanted if other.name not in self.saves]
            self.saves |= run_layouts(missing, self.folder, self.common)
        return self.saves[run.name], self.saves[single.name]

    def _run(self, layout: Layout, micro: int, count: int) -> Layout:
        name = f"{layout.name}-micro{micro}-x{microbatches(layout, count)}"
        return self._with_batch(name, layout, micro, layout.flags, self._whole(layout, micro, count))

    def _single(self, layout: Layout, micro: int, count: int) -> Layout:
        whole = self._whole(layout, micro, count)
        name = f"single-{optimizer_of(layout)}-{whole}"
        return self._with_batch(name, replace(layout, world=1), 2 if whole % 2 == 0 else 1, (), whole)

    def _with_batch(self, name: str, layout: Layout, micro: int, flags: tuple[str, ...], whole: int) -> Layout:
        return Layout(name, layout.world, (*flags, *batch_flags(micro, whole), *OPTIMIZERS[optimizer_of(layout)]))

    def _whole(self, layout: Layout, micro: int, count: int) -> int:
        return micro * microbatches(layout, count) * layout.replicas


def _same_tier(layout: Layout, default: tuple[str, ...]) -> list[Layout]:
    """The layouts that are run in the default tier, or those that are not."""
    return [other for other in LAYOUTS if (other.name in default) == (layout.name in default)]


@pytest.fixture(scope="module")
def fp32_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("fp32"), data)


@pytest.mark.parametrize("layout, micro, count", [
    pytest.param(
        layout, *batch, id=f"{batch[0]}-{batch[1]}-{layout.name}",
        marks=() if layout.name in DEFAULT and batch == BATCHES[0] else pytest.mark.long,
    )
    for batch in BATCHES for layout in LAYOUTS
])  # fmt: skip
def test_layout_trains_like_one_process(fp32_runs: Runs, layout: Layout, micro: int, count: int) -> None:
    run, single = fp32_runs.compare(layout, micro, count, _same_tier(layout, DEFAULT))
    assert len(metrics(run)) == ITERATIONS
    assert_same_metrics(run, single)
    if not is_distributed(layout):  # which leaves each replica its own part of the gradients
        assert_same_gradients(run, single)
    assert_same_weights(run, single)
    assert_same_velocity(run, single)
    assert_ranks_agree(run)


@pytest.fixture(scope="module")
def bf16_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("bf16"), data, "--bf16")


@pytest.mark.parametrize("layout", [
    layout if layout.name in BF16_DEFAULT else pytest.param(layout, marks=pytest.mark.long) for layout in LAYOUTS
], ids=lambda layout: layout.name)
def test_layout_in_bf16_stays_near_one_process(bf16_runs: Runs, layout: Layout) -> None:
    run, single = bf16_runs.compare(layout, 2, 1, _same_tier(layout, BF16_DEFAULT))
    for row, want in zip(metrics(run), metrics(single), strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=2e-2)


# Ranks, flags and microbatches of seven layers in the interleaved schedule: microbatches that do not come in groups of
# one for each rank, more than two ranks, and stages of different sizes.
INTERLEAVED = {
    "pp2-x3": (2, (PP, "2"), 3),
    "pp2-x5": (2, (PP, "2"), 5),
    "pp3-split-x4": (3, (PP, "3", "--pipeline-layer-split", "1,2,1,1,1,1"), 4),
    "pp3-cp2-x3": (6, (PP, "3", CP, "2"), 3),
}


@pytest.fixture(scope="module")
def interleaved_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    layouts = {Layout(f"single-{count}", 1, batch_flags(1, count)) for *_, count in INTERLEAVED.values()}
    layouts |= {
        Layout(name, world, (*flags, *VIRTUAL, *batch_flags(1, count)))
        for name, (world, flags, count) in INTERLEAVED.items()
    }
    common = [*common_flags(data, 3), "--num-layers", "7", *SGD]
    return run_layouts(list(layouts), tmp_path_factory.mktemp("interleaved"), common)


@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_stages_train_like_one_process(interleaved_runs: dict[str, Path], name: str) -> None:
    run, single = interleaved_runs[name], interleaved_runs[f"single-{INTERLEAVED[name][2]}"]
    assert_same_metrics(run, single)
    assert_same_gradients(run, single)
    assert_same_weights(run, single)
    assert_ranks_agree(run)


@pytest.fixture(scope="module")
def spoiled_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four iterations of layouts with a bug planted in each, and without."""
    layouts = [Layout("single", 1)]
    for bug, flags in SPOILED.items():
        layouts += [Layout(f"{bug}-sound", 2, flags), Layout(bug, 2, flags, bug=bug)]
    layouts.append(Layout("stray_copy", 2, (TP, "2"), bug="stray_copy"))
    return run_layouts(
        layouts, tmp_path_factory.mktemp("spoiled"), [*common_flags(data, 4), *batch_flags(2, 4), *SGD], timeout=1800
    )


@pytest.mark.parametrize("bug", SPOILED)
def test_the_harness_notices_a_planted_bug(spoiled_runs: dict[str, Path], bug: str) -> None:
    assert_same_gradients(spoiled_runs[f"{bug}-sound"], spoiled_runs["single"])
    # Early gradients of blocks are too small to show in a gradient norm: each tensor is compared for that.
    with pytest.raises(AssertionError, match="gradient of .* is .* off"):
        assert_same_gradients(spoiled_runs[bug], spoiled_runs["single"])


def test_the_harness_notices_a_copy_that_goes_astray(spoiled_runs: dict[str, Path]) -> None:
    """A rank that does not save: gradients and weights that are compared with one process are sound."""
    assert_ranks_agree(spoiled_runs["norm_weights-sound"])
    assert_same_gradients(spoiled_runs["stray_copy"], spoiled_runs["single"])
    with pytest.raises(AssertionError, match="different copies of .*grad conditioning.phi.conv_out.bias"):
        assert_ranks_agree(spoiled_runs["stray_copy"])


def test_the_reference_run_learns(fp32_runs: Runs) -> None:
    _, single = fp32_runs.compare(LAYOUTS[0], *BATCHES[0], LAYOUTS)
    losses = [row["loss"] for row in metrics(single)]
    assert len(set(losses)) == ITERATIONS
    assert losses[0] == pytest.approx(2.0, rel=0.2)  # a zero head predicts 0 for noise - latents of unit variance


@pytest.fixture(scope="module")
def adam_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """AdamW in one process; with the distributed optimizer; halves of runs that go on elsewhere; adaptive clipping."""
    folder = tmp_path_factory.mktemp("adam")
    first, second = ("--exit-interval", "2"), lambda name: ("--load", str(folder / name))
    layouts = [
        Layout("single", 1),
        Layout("tp2-sp-half", 2, (TP, "2", SP, *first)),
        Layout("pp2-rest", 2, (PP, "2", *second("tp2-sp-half"))),
        Layout("distributed-optimizer", 2, ("--use-distributed-optimizer",)),
        Layout("adaptive", 1, ADAPTIVE),
        Layout("adaptive-distributed-optimizer", 2, (*OVERLAP, *ADAPTIVE)),
        Layout("distributed-optimizer-half", 2, ("--use-distributed-optimizer", *first)),
        Layout("virtual-half", 2, (PP, "2", *VIRTUAL, *first)),
        Layout("tp2-rest", 2, (TP, "2", *second("distributed-optimizer-half"))),
        Layout("bf16", 1, ("--bf16",)),
        Layout("bf16-tp2-sp", 2, (TP, "2", SP, "--bf16")),
        Layout("bf16-pp2", 2, (PP, "2", "--bf16")),
        Layout("overlap", 2, OVERLAP),
        Layout("overlap-half", 2, (*OVERLAP, *first)),
        Layout("overlap-rest", 2, (*OVERLAP, *second("overlap-half"))),
        Layout("cp2-rest", 2, (CP, "2", *second("virtual-half"))),
        Layout("sgd", 1, SGD),
        Layout("sgd-adaptive", 1, (*SGD, *ADAPTIVE)),
        Layout("sgd-adaptive-tp2", 2, (TP, "2", *SGD, *ADAPTIVE)),
        Layout("sgd-adaptive-dp2", 2, (*SGD, *ADAPTIVE)),
        # What a layout loads of another's checkpoint, saved again.
        Layout("again-pp4", 4, (PP, "4", *second("tp2-sp-half")), saves_again=True),
        Layout("again-cp2-tp2", 4, (CP, "2", TP, "2", OVERLAP[0], *second("distributed-optimizer-half")),
               saves_again=True),
        Layout("again-virtual", 4, (TP, "2", PP, "2", *VIRTUAL, *second("virtual-half")), saves_again=True),
    ]
    return run_layouts(layouts, folder, [*common_flags(data), *batch_flags(2, 4), *OPTIMIZERS["damped-adam"]])


@pytest.mark.parametrize("name, reference", [
    ("distributed-optimizer", "single"), ("overlap", "single"), ("adaptive-distributed-optimizer", "adaptive"),
])
def test_distributed_optimizer_trains_like_one_process(adam_runs: dict[str, Path], name: str, reference: str) -> None:
    assert_same_metrics(adam_runs[name], adam_runs[reference])


@pytest.mark.parametrize("name, reference, relative", [
    ("bf16", "single", 5e-3), ("bf16-tp2-sp", "bf16", 2e-3), ("bf16-pp2", "bf16", 2e-3),
])
def test_bf16_stays_near(adam_runs: dict[str, Path], name: str, reference: str, relative: float) -> None:
    assert_same_metrics(adam_runs[name], adam_runs[reference], relative)


def test_overlapped_gather_saves_the_updated_weights(adam_runs: dict[str, Path]) -> None:
    found, expected = weights(adam_runs["overlap"]), weights(adam_runs["distributed-optimizer"])
    assert all(torch.equal(found[name], want) for name, want in expected.items())


@pytest.mark.parametrize("name", ["pp2-rest", "tp2-rest", "cp2-rest", "overlap-rest", "distributed-optimizer"])
def test_adam_steps_give_the_weights_of_one_process(adam_runs: dict[str, Path], name: str) -> None:
    """Of runs that went on from another layout, too."""
    assert_same_weights(adam_runs[name], adam_runs["single"])


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


@pytest.mark.parametrize("half, again", [
    ("tp2-sp-half", "again-pp4"), ("distributed-optimizer-half", "again-cp2-tp2"), ("virtual-half", "again-virtual"),
])
def test_a_checkpoint_goes_through_another_layout_bit_for_bit(
    adam_runs: dict[str, Path], half: str, again: str
) -> None:
    stored, found = (tensors(find_checkpoint(adam_runs[name]), "") for name in (half, again))
    assert stored.keys() == found.keys() and any(key.startswith("optimizer.exp_avg_sq.") for key in stored)
    assert all(torch.equal(found[key], value) for key, value in stored.items())


@pytest.mark.parametrize("name", ["sgd-adaptive-tp2", "sgd-adaptive-dp2"])
def test_adaptive_clipping_is_the_same_on_all_ranks(adam_runs: dict[str, Path], name: str) -> None:
    assert_same_metrics(adam_runs[name], adam_runs["sgd-adaptive"])
    assert_same_weights(adam_runs[name], adam_runs["sgd-adaptive"])
    with pytest.raises(AssertionError):
        assert_same_weights(adam_runs[name], adam_runs["sgd"])  # another run than with the fixed norm
