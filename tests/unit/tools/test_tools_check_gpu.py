"""The check of a card: what fails or hangs does not stop the rest, and nothing begins without a card."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "check_gpu.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_gpu", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_gpu"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_gpu", *flags])
    return tool.main()


def test_what_fails_does_not_stop_the_rest(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = sys.executable
    steps = {
        "hangs": (lambda check: check.run(python, "-c", "import time; time.sleep(60)"), 1),
        "breaks": (lambda check: check.run(python, "-c", "import sys; print('what it said'); sys.exit(3)"), 30),
        "differs": (lambda check: tool._near([(1.0, 2.0)], [(1.0, 2.1)], 1e-5), 30),
        "passes": (lambda check: check.run(python, "-c", "print('good')").strip(), 30),
    }
    monkeypatch.setattr(tool, "STEPS", steps)
    monkeypatch.setattr(tool, "obstacles", lambda rehearse: [])
    assert run(tool, monkeypatch, "--rehearse", "--json", str(tmp_path / "report.json")) == 1
    rows = {row["step"]: row for row in json.loads((tmp_path / "report.json").read_text())["steps"]}
    assert [row["passed"] for row in rows.values()] == [False, False, False, True]
    assert rows["hangs"]["found"] == "took longer than its limit" and rows["hangs"]["seconds"] < 30
    assert rows["breaks"]["found"] == "exit code 3: what it said"
    assert "differs by 0.048" in rows["differs"]["found"]
    assert capsys.readouterr().out.count("FAILED") == 3
    assert run(tool, monkeypatch, "--only", "passes", "--json", str(tmp_path / "report.json")) == 0


def test_nothing_begins_without_a_card_or_a_package(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tool, monkeypatch, "--json", str(tmp_path / "report.json")) == 2
    assert "torch finds no CUDA device; --rehearse" in capsys.readouterr().err
    monkeypatch.setitem(tool.NEEDED, "nowhere.to.be.found", "nowhere")
    assert run(tool, monkeypatch, "--rehearse", "--json", str(tmp_path / "report.json")) == 2
    assert "not installed: nowhere" in capsys.readouterr().err and not (tmp_path / "report.json").exists()
