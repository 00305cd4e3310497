"""The command line answers quickly, in one line, with true exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_flashi2v.cli.main import COMMANDS, main

PROBE = "import sys; from megatron_flashi2v.cli.main import main\ntry: main({argv})\nexcept SystemExit: pass\n" \
        "assert 'torch' not in sys.modules, 'torch was imported'"


@pytest.mark.parametrize("argv", [["--help"], *([command, "--help"] for command in COMMANDS), ["train", "--lr", "x"]])
def test_help_and_bad_flags_answer_without_torch(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE.format(argv=argv)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_user_error_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashi2v train: error: --config") and error.count("\n") == 1


@pytest.mark.parametrize("model, total", [("tiny", None), ("1.3b", "1,421,475,984"), ("14b", "14,315,062,416")])
def test_dry_run_shows_configuration_parameters_and_layout(
    model: str, total: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parents[3] / "examples" / "recipes" / f"{model}.yaml"
    assert main(["train", "--config", str(recipe), "--dry-run"]) == 0
    report = capsys.readouterr().out
    assert f"model: {model}" in report and "# layout" in report
    assert total is None or f"total: {total}" in report
    assert "# kernels on this machine's cpu" in report and "\nattention: torch_sdpa" in report
    assert "\nada_layer_norm: torch  # triton: runs on cuda, not on cpu" in report


def test_dry_run_where_the_devices_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "tiny", "--device", "npu", "--dry-run"]) == 0
    report = capsys.readouterr().out
    assert "# layout" in report and "torch_npu" in report
    assert "# kernels: not those of the training, for on this machine: " in report
