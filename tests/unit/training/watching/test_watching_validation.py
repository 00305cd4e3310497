"""The validation loss: fixed questions, right answers, and a training that does not notice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.layouts import metrics, tensors
from helpers.synthetic_data import write_synthetic
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH
from torch.nn import functional as F

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.data.prepared import PreparedDataset, pad_text_rows
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.files import read_jsonl
from megatron_flashi2v.sampling.load import load_model
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.sigma_buckets import BatchLoss
from megatron_flashi2v.training.step import TrainingStep
from megatron_flashi2v.training.watching.schedule import Schedule
from megatron_flashi2v.training.watching.validation import Validation, ValidationSource, mean_loss

Train = Callable[..., int]
SAME = ("iteration", "consumed_samples", "loss", "loss_by_sigma", "samples_by_sigma")


def rows(save: Path) -> list[dict]:
    """The rows without times."""
    return [{name: row[name] for name in SAME} for row in read_jsonl(save / "validation.jsonl")]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five samples: evaluations of two batches of four go around."""
    return write_synthetic(tmp_path_factory.mktemp("valid") / "set", 5, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=9)


@pytest.fixture
def flags(valid: Path) -> tuple[object, ...]:
    return "--valid-data-path", valid, "--eval-interval", 2, "--eval-iters", 2


@pytest.mark.parametrize("others", [
    (), ("--bf16", "--recompute-granularity", "full"),
    ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
], ids=str)
def test_training_does_not_notice(
    train: Train, tmp_path: Path, flags: tuple[object, ...], others: tuple[str, ...]
) -> None:
    assert train("--save", tmp_path / "with", *others, *flags) == 0
    assert train("--save", tmp_path / "without", *others) == 0
    assert [row["iteration"] for row in rows(tmp_path / "with")] == [2, 4]
    assert not (tmp_path / "without" / "validation.jsonl").exists()
    for row, want in zip(metrics(tmp_path / "with"), metrics(tmp_path / "without"), strict=True):
        assert (row["loss"], row["grad_norm"]) == (want["loss"], want["grad_norm"])
    found, expected = (tensors(find_checkpoint(tmp_path / name), prefix="") for name in ("with", "without"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_loss_is_that_of_the_saved_model(
    train: Train, tmp_path: Path, valid: Path, flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found again from the checkpoint, sample by sample; draws are kept from the run."""
    kept, draw = {}, MicrobatchSource.draw

    def keep(self: MicrobatchSource, positions: range, samples: list) -> object:
        batch = draw(self, positions, samples)
        if isinstance(self, ValidationSource):
            for index, (position, sample) in enumerate(zip(positions, samples, strict=True)):
                one = slice(index, index + 1)
                kept[position] = (sample.key, batch.noise_BCTHW[one], batch.sigma_B[one].item(),
                                  {name: value[one] for name, value in batch.extras.items()})
        return batch

    monkeypatch.setattr(MicrobatchSource, "draw", keep)
    assert train("--save", tmp_path, *flags) == 0
    assert sorted(kept) == list(range(8))
    data = PreparedDataset(valid)
    samples = {sample.key: sample for sample in (data[index] for index in range(len(data)))}
    device = resolve_device("cpu")
    losses: dict[float, float] = {}  # eight positions, one in each bucket
    with single_process(device) as groups, torch.no_grad():
        model = load_model(find_checkpoint(tmp_path), groups, device)
        for key, noise, sigma, extras in kept.values():
            latents = samples[key].latents_CTHW.unsqueeze(0)
            text = pad_text_rows(samples[key].text_rows_LD, TEXT_LENGTH).unsqueeze(0)
            noisy = sigma * noise + (1 - sigma) * latents
            velocity = predict_velocity(model, noisy, torch.tensor([1000 * sigma]), text, latents[:, :, :1], extras)
            losses[sigma] = F.mse_loss(velocity, noise - latents).item()
    last = rows(tmp_path)[-1]
    assert last["samples_by_sigma"] == [1] * 8 and len(losses) == 8
    assert last["loss"] == pytest.approx(sum(losses.values()) / 8, rel=1e-5)
    for sigma, loss in losses.items():
        assert sigma * 8 % 1 == 0.5 and last["loss_by_sigma"][int(sigma * 8)] == pytest.approx(loss, rel=1e-5)


def test_questions_are_the_same_for_any_seed(train: Train, tmp_path: Path, flags: tuple[object, ...]) -> None:
    """An untrained head predicts 0, so that the loss tells the noise and the samples alone."""
    for seed in (5, 6):
        assert train("--save", tmp_path / str(seed), *flags, "--seed", seed, "--lr", 0) == 0
    assert rows(tmp_path / "5") == rows(tmp_path / "6")
    first, second = rows(tmp_path / "5")
    assert first["loss"] == second["loss"] and first["loss_by_sigma"] == second["loss_by_sigma"]
    assert len({row["loss"] for row in metrics(tmp_path / "5")}) == 4


def test_what_an_interrupted_run_owes_is_made_up_for(train: Train, tmp_path: Path, flags: tuple[object, ...]) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train("--save", straight, *flags) == 0
    assert train("--save", halves, *flags, "--exit-interval", 2) == 0
    assert rows(halves) == [] if (halves / "validation.jsonl").exists() else True
    for _ in range(2):  # and only once
        assert train("--save", halves, "--load", halves, *flags) == 0
        assert rows(halves) == rows(straight)


def test_a_signal_ends_an_evaluation(
    train: Train, tmp_path: Path, flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for, no further iteration is trained, and what was trained is saved."""
    evaluate, calls = TrainingStep.evaluate, []

    def signalled(self: TrainingStep, *arguments: object) -> BatchLoss:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "evaluate", signalled)
        assert train("--save", tmp_path / "left", *flags) == 0
    assert len(calls) == 1 and len(metrics(tmp_path / "left")) == 2
    assert (tmp_path / "left" / "iter_0000002").is_dir()
    assert train("--save", tmp_path / "left", "--load", tmp_path / "left", *flags) == 0
    assert train("--save", tmp_path / "whole", *flags) == 0
    assert rows(tmp_path / "left") == rows(tmp_path / "whole")


def test_each_batch_is_progress() -> None:
    """A long evaluation is not a hang."""
    asked: list[str] = []
    source = SimpleNamespace(
        batch=SimpleNamespace(global_batch_size=4), bad=[], data=SimpleNamespace(latent_shape=lambda position: (1, 1))
    )
    loss = BatchLoss(mean=1.0, by_sigma=(1.0,), samples_by_sigma=(4,))
    step = SimpleNamespace(batches=lambda source, position: [], evaluate=lambda batches, shape: loss)
    answers, recorded = [True] * 7 + [True, False], []

    def begin_part(doing: str) -> bool:
        asked.append(doing)
        return answers.pop(0)

    validation = Validation(source, step, 7, Schedule(2, 10), begin_part, recorded.append)  # type: ignore[arg-type]
    validation.between_iterations(SimpleNamespace(iteration=3, consumed_samples=12))  # type: ignore[arg-type]
    assert not asked
    validation.between_iterations(SimpleNamespace(iteration=4, consumed_samples=16))  # type: ignore[arg-type]
    assert asked == ["the validation of iteration 4"] * 7
    assert [(row["iteration"], row["consumed_samples"], row["loss"]) for row in recorded] == [(4, 16, 1.0)]
    validation.between_iterations(SimpleNamespace(iteration=10, consumed_samples=40))  # type: ignore[arg-type]
    assert len(asked) == 9 and len(recorded) == 1  # a rank was asked to leave


@pytest.mark.parametrize(("done_at", "due"), [(None, [2, 4, 5]), (2, [4, 5]), (5, [2, 4]), (3, [2, 4, 5])])
def test_when_it_is_due(done_at: int | None, due: list[int]) -> None:
    schedule = Schedule(2, 5, done_at)
    assert [iteration for iteration in range(6) if schedule.is_due(iteration)] == due


def test_batches_are_joined_by_their_samples() -> None:
    first = BatchLoss(mean=2.0, by_sigma=(1.0, None, 3.0), samples_by_sigma=(1, 0, 1))
    second = BatchLoss(mean=5.0, by_sigma=(5.0, None, None), samples_by_sigma=(2, 0, 0))
    assert mean_loss([first, second]) == BatchLoss(
        mean=3.5, by_sigma=(pytest.approx(11 / 3), None, 3.0), samples_by_sigma=(3, 0, 1)
    )


@pytest.mark.parametrize("given, message", [
    (("--eval-interval", 2), "--eval-interval 2 needs --valid-data-path"),
    (("--valid-data-path", "a"), "--valid-data-path a requires --eval-interval or --sample-interval"),
    (("--eval-interval", 0, "--valid-data-path", "a"), "--eval-interval is 0; it must be at least 1"),
    (("--eval-interval", 2, "--valid-data-path", "nowhere"), "nowhere"),
    (("--eval-interval", 2, "--valid-data-path", "0.5", "a", "b"), "--valid-data-path 0.5 a b: 3 words"),
])
def test_refusals(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[object, ...], message: str
) -> None:
    assert train(*given) != 0
    assert message in capsys.readouterr().err


def test_data_of_another_kind_are_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_synthetic(
        tmp_path / "set", 5, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=9, text_cleaning="none"
    )
    assert train("--eval-interval", 2, "--valid-data-path", other) != 0
    assert "was prepared with another text_cleaning than" in capsys.readouterr().err
