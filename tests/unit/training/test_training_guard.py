"""Updates that must not be applied: which are skipped, that a skip changes nothing, and when the run stops."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import metrics, tensors, without_times
from helpers.planted_faults import spoiled_gradient

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.config.train import FaultArguments
from megatron_flashi2v.training.guard import UpdateGuard

Train = Callable[..., int]
NAN = math.nan


def guard_of(**arguments: Any) -> UpdateGuard:
    return UpdateGuard(FaultArguments(**arguments))


def resumed(guard: UpdateGuard, **arguments: Any) -> UpdateGuard:
    """Another one that goes on from its state, as a checkpoint keeps it."""
    another = guard_of(**arguments)
    another.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    return another


@pytest.mark.parametrize(("loss", "norm", "reason"), [
    (1.0, 1.0, None), (0.0, 0.0, None), (NAN, 1.0, "loss_not_finite"), (math.inf, NAN, "loss_not_finite"),
    (1.0, NAN, "grad_norm_not_finite"), (1.0, math.inf, "grad_norm_not_finite"), (1e30, 1e30, None),
])
def test_what_is_not_finite_is_skipped(loss: float, norm: float, reason: str | None) -> None:
    assert guard_of().judge(1, loss, norm) == reason


def test_spikes_are_measured_by_the_median_of_applied_updates() -> None:
    guard = guard_of(skip_loss_spike_factor=3.0, skip_grad_norm_spike_factor=10.0, spike_window=5)
    dice, kept = random.Random(0), []
    for iteration in range(1, 41):
        loss, norm = dice.uniform(1, 2), dice.uniform(1, 2)
        if iteration % 7 == 0:
            loss = dice.choice([2.9, 3.1]) * statistics.median([value for value, _ in kept[-5:]])
        if iteration % 11 == 0:
            norm = dice.choice([9.9, 10.1]) * statistics.median([value for _, value in kept[-5:]])
        expected = None
        if len(kept) >= 5:  # nothing is usual before
            usual_loss, usual_norm = (statistics.median(values[-5:]) for values in zip(*kept, strict=True))
            if norm > 10 * usual_norm:
                expected = "grad_norm_spike"
            if loss > 3 * usual_loss:
                expected = "loss_spike"
        assert guard.judge(iteration, loss, norm) == expected, iteration
        if expected is None:
            kept.append((loss, norm))
    assert 2 <= 40 - len(kept) <= 6


def test_spikes_do_not_become_usual() -> None:
    guard = guard_of(skip_loss_spike_factor=3.0, spike_window=3, max_skipped_updates=9)
    assert [guard.judge(iteration, 1.0, 1.0) for iteration in (1, 2, 3)] == [None] * 3
    assert [guard.judge(iteration, 10.0, 1.0) for iteration in range(4, 12)] == ["loss_spike"] * 8


def test_spikes_pass_by_default() -> None:
    guard = guard_of(spike_window=1)
    assert guard.judge(1, 1.0, 1.0) is None and guard.judge(2, 1e9, 1e9) is None


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_so_many_in_a_row_and_then_a_clear_stop(limit: int) -> None:
    guard = guard_of(max_skipped_updates=limit)
    assert guard.judge(1, 1.0, 1.0) is None
    for iteration in range(2, 2 + limit):
        assert guard.judge(iteration, NAN, NAN) == "loss_not_finite"
        guard = resumed(guard, max_skipped_updates=limit)
    with pytest.raises(UserError) as stopped:
        guard.judge(2 + limit, 1.0, math.inf)
    message = str(stopped.value)
    for words in (f"iteration {2 + limit}: the gradient norm is inf", f"{limit + 1} updates in a row",
                  f"--max-skipped-updates allows {limit}", "those of iteration 1", "lower --lr"):
        assert words in message


def test_an_applied_update_ends_the_row_but_single_skips_do_not_go_on_for_ever() -> None:
    guard, skipped = guard_of(max_skipped_updates=2), []
    with pytest.raises(UserError, match="21 of the last 1000 updates .* allows 20"):
        for iteration in range(1, 100):
            if guard.judge(iteration, 1.0 if iteration % 3 else NAN, 1.0):
                skipped.append(iteration)
                guard = resumed(guard, max_skipped_updates=2)
    assert len(skipped) == 20
    sparse = guard_of(max_skipped_updates=1)  # one in 101: never 11 of 1000
    assert sum(sparse.judge(iteration, 1.0 if iteration % 101 else NAN, 1.0) is not None
               for iteration in range(1, 5000)) == 49


def test_its_state_goes_on_exactly() -> None:
    """Through JSON, in the middle of a row, with a window that is being filled."""
    arguments: dict[str, Any] = {
        "skip_loss_spike_factor": 1.5, "skip_grad_norm_spike_factor": 1.6, "spike_window": 7, "max_skipped_updates": 60,
    }
    dice = random.Random(4)
    values = [(dice.uniform(0.5, 2), NAN if dice.random() < 0.2 else dice.uniform(0.5, 2)) for _ in range(60)]
    for cut in (1, 3, 22, 23, 24, 40):
        straight, halves = guard_of(**arguments), guard_of(**arguments)
        whole = [straight.judge(number, *pair) for number, pair in enumerate(values)]
        found = [halves.judge(number, *pair) for number, pair in enumerate(values[:cut])]
        halves = resumed(halves, **arguments)
        found += [halves.judge(cut + number, *pair) for number, pair in enumerate(values[cut:])]
        assert found == whole and halves.state_dict() == straight.state_dict()
    assert {reason for reason in whole if reason} == {"loss_spike", "grad_norm_spike", "grad_norm_not_finite"}


def assert_same(first: Path, second: Path) -> None:
    """Weights, optimizer and averages of two checkpoints are equal, bit for bit."""
    found, expected = (tensors(folder, prefix="") for folder in (first, second))
    assert found.keys() == expected.keys() and {name.split(".")[0] for name in found} >= {"model", "ema"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


@pytest.mark.parametrize("flags", [
    ("--clip-grad-method", "adaptive"),
    ("--bf16", "--clip-grad-method", "adaptive-npu", "--clip-grad-rules", "reference"),
    ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ("--optimizer", "sgd", "--bf16"),
], ids=lambda flags: flags[1])
def test_a_skip_changes_nothing_but_the_position(train: Train, tmp_path: Path, flags: tuple[str, ...]) -> None:
    flags = (*flags, "--ema-decay", "0.9", "--lr-decay-style", "cosine")
    assert train("--save", tmp_path / "one", *flags, "--exit-interval", 1) == 0
    spoiled = spoiled_gradient({2}, NAN)
    assert train("--save", tmp_path / "two", *flags, "--exit-interval", 2, observers=[spoiled]) == 0
    before, after = tmp_path / "one" / "iter_0000001", tmp_path / "two" / "iter_0000002"
    assert_same(after, before)
    for name in ("clipper", "ema"):
        assert state(after)[name] == state(before)[name]
    row = metrics(tmp_path / "two")[1]
    assert row["skipped"] == "grad_norm_not_finite" and row["grad_norm"] is None and row["consumed_samples"] == 8
    assert "skipped" not in metrics(tmp_path / "two")[0]
    # The next update is applied, by the schedule of its own number.
    assert train("--save", tmp_path / "two", "--load", tmp_path / "two", *flags) == 0
    assert train("--save", tmp_path / "whole", *flags) == 0
    assert [row["lr"] for row in metrics(tmp_path / "two")] == [row["lr"] for row in metrics(tmp_path / "whole")]
    assert state(tmp_path / "two" / "iter_0000004")["guard"]["streak"] == 0
    trained = tensors(tmp_path / "two" / "iter_0000004")
    assert not all(torch.equal(trained[name], tensor) for name, tensor in tensors(after).items())


def test_a_run_stops_and_its_newest_checkpoint_is_a_good_one(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--train-iters", 9, "--save-interval", 1, "--keep-last", 1)
    assert train("--save", tmp_path, *flags, observers=[spoiled_gradient({3, 4, 5, 6, 7}, NAN)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flashi2v train: error: iteration 6: the gradient norm is nan; 4 updates in a row")
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000002" and len(list(tmp_path.glob("iter_*"))) == 1
    assert [row.get("skipped") is None for row in metrics(tmp_path)] == [True, True, False, False, False]


def test_a_diverged_loss_stops_the_run(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--optimizer", "sgd", "--lr", 1e25, "--clip-grad", 0, "--save-interval", 1, "--train-iters", 9)
    assert train("--save", tmp_path, *flags) == 1
    assert "iteration 5: the loss is " in capsys.readouterr().err
    rows = metrics(tmp_path)
    assert [row["loss"] is None for row in rows] == [False, True, True, True]
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000001"


def test_a_save_that_falls_into_a_row_is_made_up_for(train: Train, tmp_path: Path) -> None:
    spoiled = spoiled_gradient({2, 3}, NAN)
    assert train("--save", tmp_path, "--train-iters", 6, "--save-interval", 2, observers=[spoiled]) == 0
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000006"]


@pytest.mark.parametrize("cut", [3, 4])
def test_a_run_that_is_resumed_in_the_middle_of_a_row(train: Train, tmp_path: Path, cut: int) -> None:
    """Iterations 3 and 4 are skipped, 7 is a spike, 10 to 13 are too many: cut or whole."""
    spikes = ("--skip-grad-norm-spike-factor", 100, "--spike-window", 2, "--ema-decay", 0.9, "--train-iters", 20)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    spoiled = [spoiled_gradient({3, 4, 10, 11, 12, 13}, NAN), spoiled_gradient({7}, 1e9)]
    assert train("--save", straight, *spikes, "--save-interval", 9, observers=spoiled) == 1
    assert train("--save", halves, *spikes, "--exit-interval", cut, observers=spoiled) == 0
    assert state(halves / f"iter_000000{cut}")["guard"]["streak"] == cut - 2
    assert train("--save", halves, "--load", halves, *spikes, "--save-interval", 9, observers=spoiled) == 1
    rows = [[without_times(row) for row in metrics(save)] for save in (straight, halves)]
    assert rows[0] == rows[1] and len(rows[0]) == 12
    assert {row["iteration"]: row["skipped"].split("_")[-1] for row in rows[0] if "skipped" in row} == {
        3: "finite", 4: "finite", 7: "spike", 10: "finite", 11: "finite", 12: "finite"}
    assert_same(halves / "iter_0000009", straight / "iter_0000009")
    assert state(halves / "iter_0000009")["guard"] == state(straight / "iter_0000009")["guard"]


@pytest.mark.parametrize(("flags", "words"), [
    (("--max-skipped-updates", -1), "--max-skipped-updates is -1; it must be at least 0"),
    (("--skip-loss-spike-factor", 1.0), "--skip-loss-spike-factor is 1.0; it must be above 1"),
    (("--skip-grad-norm-spike-factor", 0.5), "--skip-grad-norm-spike-factor is 0.5"),
    (("--spike-window", 0), "--spike-window is 0; it must be at least 1"),
])
def test_limits_that_make_no_sense(
    train: Train, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], words: str
) -> None:
    assert train(*flags) == 2
    assert words in capsys.readouterr().err
