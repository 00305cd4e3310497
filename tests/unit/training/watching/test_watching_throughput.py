"""Rates of an iteration by hand, waits of replicas kept apart, and what a run writes of both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.layouts import metrics
from helpers.train_command import LATENT_SHAPE

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments
from megatron_flashi2v.models.flops import forward_flops
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.watching.throughput import PerReplica, ThroughputMeter

Train = Callable[..., int]
MODEL = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=4)
SHAPE = (2, 4, 6)  # 2 x 2 x 3 tokens


def meter(
    name: str = "NVIDIA H100 80GB HBM3", bf16: bool = True, fp8: bool = False, frozen: bool = False
) -> ThroughputMeter:
    device = CpuDevice()
    device.model_name = lambda: name  # type: ignore[method-assign]
    return ThroughputMeter(BatchArguments(global_batch_size=6, bf16=bf16), MODEL, device, 4, fp8=fp8, frozen=frozen)


def test_rates_by_hand() -> None:
    rates = meter().measure(SHAPE, 0.5, 0.125)
    assert rates.samples_per_s == 12 and rates.tokens_per_s == 12 * 12 and rates.data_wait_s == 0.125
    work = 3 * 6 * sum(forward_flops(MODEL, SHAPE).values())  # forward, and backward for twice as much
    assert rates.tflops == pytest.approx(work / 0.5 / 4 / 1e12, rel=1e-12)
    assert rates.mfu == pytest.approx(rates.tflops / 989.0)
    assert 0.01 < rates.memory_gb < 1000


@pytest.mark.parametrize("other", [{"name": "some card"}, {"bf16": False}, {"fp8": True}])
def test_mfu_is_told_only_where_the_peak_is_known(other: dict) -> None:
    assert meter(**other).measure(SHAPE, 0.5, 0.0).mfu is None


def test_frozen_weights_have_no_model_defined_rate() -> None:
    """The definition counts the gradients of all weights: what is not computed would pass for speed."""
    rates = meter(frozen=True).measure(SHAPE, 0.5, 0.0)
    assert rates.tflops is None and rates.mfu is None and rates.samples_per_s == 12


def test_the_number_of_each_replica() -> None:
    def group(rank: int, size: int = 2) -> SimpleNamespace:
        return SimpleNamespace(rank=lambda: rank, size=lambda: size)

    rows = []
    for dp, number in enumerate((25, 150)):
        for tp in (0, 1):
            for pp in (0, 1):
                groups = SimpleNamespace(dp=group(dp), tp=group(tp), pp=group(pp), cp=group(0, 1))
                rows.append(PerReplica(groups).counts(number + tp + pp))  # type: ignore[arg-type]
    assert [sum(column) for column in zip(*rows, strict=True)] == [25, 150]


def test_a_run_writes_its_rates_and_its_loss_by_sigma(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = MicrobatchSource.load

    def slow(self: MicrobatchSource, positions: range) -> object:
        if positions[0] == 8:  # the third iteration
            time.sleep(0.3)
        return load(self, positions)

    monkeypatch.setattr(MicrobatchSource, "load", slow)
    monkeypatch.setattr("megatron_flashi2v.training.reading.MICROBATCHES_AHEAD", 0)
    assert train("--save", tmp_path) == 0
    tokens = math.prod(LATENT_SHAPE[1:]) // 4
    for number, row in enumerate(metrics(tmp_path)):
        assert row["samples_per_s"] == pytest.approx(4 / row["step_time_s"])
        assert row["tokens_per_s"] == pytest.approx(4 * tokens / row["step_time_s"])
        assert row["tflops"] > 0 and row["mfu"] is None and row["memory_gb"] > 0.01
        assert (row["data_wait_s"] >= 0.3) == (number == 2) and row["data_wait_s"] < row["step_time_s"]
        means, counts = row["loss_by_sigma"], row["samples_by_sigma"]
        assert sum(counts) == 4 and [mean is None for mean in means] == [count == 0 for count in counts]
        total = sum(mean * count for mean, count in zip(means, counts, strict=True) if count)
        assert total / 4 == pytest.approx(row["loss"], rel=1e-6)
