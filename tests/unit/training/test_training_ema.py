"""The moving average of the weights: its formula, resumed runs, and who reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.layouts import tensors

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.conversion.formats.megatron import open_weights
from megatron_flashi2v.conversion.weights import ReadOptions
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.load import load_stages, resolve_checkpoint
from megatron_flashi2v.training.ema import decay_of_update

Train = Callable[..., int]


def saved(save: Path, iteration: int, prefix: str) -> dict[str, torch.Tensor]:
    folder = find_checkpoint(save, iteration)
    assert folder is not None
    return {key.removeprefix(prefix): value for key, value in tensors(folder, prefix).items()}


def exact_weights(save: Path, iteration: int) -> dict[str, torch.Tensor]:
    """In fp32: master copies, where there are any."""
    return saved(save, iteration, "model.") | saved(save, iteration, "optimizer.master.")


def test_decay_warms_up_as_the_reference() -> None:
    """FlashI2V's npu branch: min(0.9999, (1 + n) / (10 + n)), n from 1."""
    assert [decay_of_update(n, 0.9999, "reference") for n in (1, 2, 90)] == [2 / 11, 3 / 12, 91 / 100]
    assert decay_of_update(1_000_000, 0.9999, "reference") == 0.9999
    assert decay_of_update(1, 0.9999, "none") == 0.9999


@pytest.mark.parametrize("flags", [(), ("--bf16", "--use-distributed-optimizer"), ("--ema-warmup", "none")])
def test_the_average_follows_the_formula(train: Train, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """With a limit of 0.3, the first two updates warm up and the others do not."""
    assert train("--save", tmp_path / "still", "--lr", 0, "--train-iters", 1, "--ema-decay", 0.3, *flags) == 0
    save = tmp_path / "run"
    assert train("--save", save, "--save-interval", 1, "--ema-decay", 0.3, *flags) == 0
    averages = {name: tensor.double() for name, tensor in exact_weights(tmp_path / "still", 1).items()}
    for iteration in range(1, 5):
        decay = 0.3 if "none" in flags else min(0.3, (1 + iteration) / (10 + iteration))
        present, found = exact_weights(save, iteration), saved(save, iteration, "ema.")
        assert found.keys() == averages.keys()
        for name, average in averages.items():
            average.mul_(decay).add_(present[name].double(), alpha=1 - decay)
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), average, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(found[name], present[name]) for name in found)


def test_an_average_that_was_not_kept_starts_from_the_weights(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--save", tmp_path, "--exit-interval", 2) == 0
    still = ("--lr", 0, "--override-opt-param-scheduler")
    assert train("--save", tmp_path, "--ema-decay", 0.25, *still, "--train-iters", 3) == 0
    assert "it starts from the weights" in capsys.readouterr().err
    found, present = saved(tmp_path, 3, "ema."), exact_weights(tmp_path, 3)
    for name, value in present.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
    assert json.loads((tmp_path / "iter_0000003" / "state.json").read_text())["ema"]["updates"] == 1


def test_sampling_and_converting_read_the_average(train: Train, tmp_path: Path) -> None:
    assert train("--save", tmp_path / "run", "--ema-decay", 0.9) == 0
    expected, model = saved(tmp_path / "run", 4, "ema."), saved(tmp_path / "run", 4, "model.")
    device, folder = resolve_device("cpu", 0), resolve_checkpoint(tmp_path / "run", "ema")
    with single_process(device) as groups:
        (stage,) = load_stages(folder, groups, device, ParallelArguments(), weights="ema")
        loaded = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
    converted = open_weights(tmp_path / "run", ReadOptions(weights="ema"))
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value) and torch.equal(converted.read(name), value)
    assert any(not torch.equal(value, model[name]) for name, value in expected.items())


def test_weights_that_are_not_there_are_refused(train: Train, tmp_path: Path) -> None:
    assert train("--save", tmp_path / "run", "--train-iters", 1) == 0
    device = resolve_device("cpu", 0)
    with pytest.raises(CheckpointError, match="no EMA weights"), single_process(device) as groups:
        load_stages(tmp_path / "run" / "iter_0000001", groups, device, ParallelArguments(), weights="ema")
