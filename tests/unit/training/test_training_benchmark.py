"""The loader's benchmark runs and tells what it should; its figures are for quiet machines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from helpers.train_command import FLAGS

TOOL = Path(__file__).parents[3] / "tools" / "benchmark_loader.py"


def test_it_measures(synthetic_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("benchmark_loader", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, value in (("ROUNDS", 2), ("ITERATIONS", 2), ("UNCOUNTED", 1)):
        monkeypatch.setattr(tool, name, value)
    tool.main([f"--{name}={value}" for name, value in FLAGS.items()] + ["--data-path", str(synthetic_data)])
    report = json.loads(capsys.readouterr().out)
    assert report["iterations"] == 4
    assert report["throughput_ratio"] > 0 and report["cpu_time_ratio"] > 0
    assert report["samples_per_s"].keys() == {"shards", "held"}
