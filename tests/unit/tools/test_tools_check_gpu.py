"""The check of a card: what fails or hangs does not stop the rest, and nothing begins without a card."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

TOOL = Path(__file__).parents[3] / "tools" / "check_gpu.py"

# In a process of its own: the tool keeps the process that its steps are forked from.
STEPS = """
import sys, time, types
from pathlib import Path
import check_gpu, check_gpu_runs, check_gpu_steps

# the limit is over once there is something to end, however slow the machine is
passed = lambda: 1000.0 if Path("begun").exists() else 0.0
check_gpu.time = check_gpu_runs.time = types.SimpleNamespace(monotonic=passed, strftime=time.strftime)
check_gpu.STEPS = {
    "breaks": (lambda check: check.python("breaks.py", CARD_TAKEN=""), 30),
    "hangs": (lambda check: check.python("hangs.py", CARD_TAKEN=""), 0.2),
    "differs": (lambda check: check_gpu_steps._near([(1.0, 2.0)], [(1.0, 2.1)], 1e-5), 30),
    "forked": (lambda check: check.python("passes.py", CARD_TAKEN="").strip(), 30),
    "anew": (lambda check: check.python("passes.py", CARD_TAKEN="by an import").strip(), 30),
}
check_gpu.ROOT, check_gpu.PRELOADED = Path(sys.argv.pop(1)), ["taken"]
check_gpu.obstacles = lambda rehearse: []
sys.exit(check_gpu.main())
"""
HANGS = """
import pathlib, subprocess
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
pathlib.Path("begun").touch()
child.wait()
"""
BREAKS = "import sys\nprint('what it said')\nsys.exit(3)\n"
PASSES = "import os, sys\nprint('forked' if 'taken' in sys.modules else 'anew', os.environ['CARD_TAKEN'])\n"
TAKEN = """
import os, sys, types
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(_is_in_bad_fork=lambda: os.environ["CARD_TAKEN"] != "")
sys.modules["torch"] = torch
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("check_gpu", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(TOOL.parent)
    spec.loader.exec_module(module)
    return module


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    for name, text in {"hangs": HANGS, "breaks": BREAKS, "passes": PASSES, "taken": TAKEN}.items():
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-c", STEPS, str(folder), "--rehearse", "--budget", "1e6", "--json",
               str(folder / "report.json")]
    # the process that forks finds what it imports by the environment alone, before Python 3.12
    paths = os.pathsep.join((str(TOOL.parent), str(folder)))
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=100, check=False
    )


def ended(pid: int) -> bool:
    try:
        psutil.Process(pid).wait(10)  # a process that was killed may still be there for a moment
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # where no one asks how it ended
    return True


def test_what_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 1, done.stderr
    rows = {row["step"]: row for row in json.loads((tmp_path / "report.json").read_text())["steps"]}
    assert [row["passed"] for row in rows.values()] == [False, False, False, True, True]
    assert rows["hangs"]["found"] == "took longer than its limit"
    assert ended(int(rows["hangs"]["log"]))  # what it started, with it
    assert rows["breaks"]["found"] == "exit code 3: what it said" == f"exit code 3: {rows['breaks']['log']}"
    assert "differs by 0.048" in rows["differs"]["found"]
    assert rows["forked"]["found"] == "forked"
    assert rows["anew"]["found"] == "anew by an import"  # no fork has a card that its parent took
    assert done.stdout.count("FAILED") == 3 and "report: " in done.stdout


def test_nothing_begins_without_a_card_or_a_package(
    tool: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    report = tmp_path / "report.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--json", str(report)])
    assert tool.main() == 2
    assert "torch finds no CUDA device; --rehearse" in capsys.readouterr().err
    monkeypatch.setitem(tool.NEEDED, "nowhere.to.be.found", "nowhere")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rehearse"])
    assert tool.main() == 2
    assert "not installed: nowhere" in capsys.readouterr().err and not report.exists()


def test_the_steps_share_one_budget(tool: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import check_gpu_runs

    now = [1000.0]
    monkeypatch.setattr(tool, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def takes(seconds: float) -> Callable[[check_gpu_runs.Check], str]:
        def step(check: check_gpu_runs.Check) -> str:
            left = check.deadline - now[0]
            now[0] += min(seconds, left)
            if seconds > left:
                raise check_gpu_runs.OutOfTime("took longer than its limit", "what it said")
            return "done"

        return step

    monkeypatch.setattr(tool, "STEPS", {
        "first": (takes(100), 150), "slow": (takes(100), 50), "cut": (takes(160), 170), "last": (takes(1), 10)
    })
    rows = list(tool.run_steps(check_gpu_runs.Check("cpu", tmp_path, True), list(tool.STEPS), 300.0))
    assert [(row["found"], row["passed"], row["seconds"]) for row in rows] == [
        ("done", True, 100.0), ("took longer than its limit", False, 50.0), ("not run: no time left", None, 150.0),
        ("not run: no time left", None, 0.0),
    ]
    assert rows[2]["log"] == "what it said"
    found = list(tool.run_steps(check_gpu_runs.Check("cpu", tmp_path, True), ["slow"], 300.0, factor=2.0))
    assert found[0]["passed"]  # the factor is of the steps' own limits


@pytest.mark.parametrize(("passed", "code"), [([True], 0), ([True, None], 3), ([None, False], 1)])
def test_the_exit_code_tells_failed_from_not_run(
    passed: list[bool | None], code: int, tool: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [{"step": "kernels", "passed": one, "found": "", "seconds": 0.0} for one in passed]
    monkeypatch.setattr(tool, "run_steps", lambda *_: rows)
    monkeypatch.setattr(tool, "PRELOADED", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--rehearse", "--json", str(tmp_path / "report.json")])
    assert tool.main() == code


def test_what_a_step_measures_depends_on_the_memory_that_is_free(
    tool: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import check_gpu_runs
    import check_gpu_steps

    asked: list[tuple[str, ...]] = []

    def python(check: check_gpu_runs.Check, *words: str, **_: object) -> str:
        asked.append(words)
        report = {"ratio_to_peer": 0.93, "model": {"num_layers": 15}, "parts": [], "launches": 7}
        Path(words[words.index("--json") + 1]).write_text(json.dumps(report))
        return ""

    monkeypatch.setattr(check_gpu_runs.Check, "python", python)
    for free_gib, layers in ((139.0, "30"), (78.0, "15")):
        check = check_gpu_runs.Check("cuda", tmp_path, False, free_gib)
        assert check_gpu_steps.step_none(check).startswith("0.930 of the peer's time (required: 0.95) with 15 layers")
        assert asked[-1][-2:] == ("--num-layers", layers)
        assert "required: 0.95" in check_gpu_steps.step_full(check)
        assert asked[-1][-3:] == ("--recompute.recompute-granularity", "full", "--no-profile")
        assert "--num-layers" not in asked[-1]
    assert list(tool.STEPS)[:2] == ["step_none", "step_full"]


@pytest.mark.long
def test_the_rehearsal_passes(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = ["bash", str(TOOL.with_suffix(".sh")), "--rehearse", "--limit-factor", "4", "--budget", "580", "--json",
               str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert all(row["passed"] for row in found["steps"]) and len(found["steps"]) == 13
    assert found["kernels"]["rows"] and found["step_none"]["ratio_to_peer"] > 0
    assert found["step_full"]["recompute"]["recompute_granularity"] == "full"
