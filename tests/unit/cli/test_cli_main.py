"""The command line answers quickly, in one line, with true exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_flashi2v.cli.main import COMMANDS, main

PROBE = "import sys; from megatron_flashi2v.cli.main import main\ntry: main({argv})\nexcept SystemExit: pass\n" \
        "assert 'torch' not in sys.modules, 'torch was imported'"


@pytest.mark.parametrize("argv", [["--help"], *([command, "--help"] for command in COMMANDS), ["train", "--lr", "x"]])
def test_help_and_bad_flags_answer_without_torch(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE.format(argv=argv)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


TOOLS = [
    path for path in sorted(Path(__file__).parents[3].glob("tools/*.py"))
    if path.stem != "make_quickstart_models" and '__name__ == "__main__"' in path.read_text()
]  # fmt: skip
"""All commands but the one that only we run."""


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_the_help_of_tools_answers_without_torch(path: Path) -> None:
    probe = (
        "import runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']; sys.path.insert(0, {str(path.parent)!r})\n"
        f"try: runpy.run_path({str(path)!r}, run_name='__main__')\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]


def test_msruns_scheduler_leaves_before_it_reads_its_flags() -> None:
    code = (
        "import os, sys; os.environ['MS_ROLE'] = 'MS_SCHED'\n"
        "from megatron_flashi2v.cli.main import run_command\n"
        "assert run_command('train', ['--no-such-flag']) == 0\n"
        "assert not {'torch', 'tyro', 'yaml'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2"}, "MS_SCHED_HOST"),
        ({"MS_WORKER_NUM": "2", "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118"}, "MS_ROLE"),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118",
          "RANK_ID": "0", "DEVICE_ID": "0"}, "--node_rank"),
    ],
)  # fmt: skip
def test_half_an_msrun_environment_is_one_message(
    given: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--model", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashi2v train: error: ") and word in error and error.count("\n") == 1


def test_torch_npu_without_cann_is_one_message(tmp_path: Path) -> None:
    """torch imports torch_npu by itself, through its entry point, and would fail before our message."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object')")
    metadata = tmp_path / "torch_npu-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**{k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-m", "megatron_flashi2v", "train", "--device", "npu"], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "libhccl.so" in done.stderr and "source CANN's set_env.sh" in done.stderr


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
    assert "\n# kernels: all 8 kernels are the default ones of a CPU (attention: torch_sdpa)\n" in report
    order = [report.index(part) for part in ("# layout", "state_gb", "# kernels", "# model", "# resolved")]
    assert order == sorted(order) and order[0] == 0
    assert "null" not in report and "[]" not in report


def test_a_dry_run_names_each_kernel_where_one_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "tiny", "--device", "cpu", "--attention-backend", "reference", "--dry-run"]) == 0
    report = capsys.readouterr().out
    assert "# kernels on this machine's cpu\nattention: reference" in report
    assert "\nada_layer_norm: torch  # triton: runs on cuda, not on cpu" in report


def test_dry_run_where_the_devices_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "tiny", "--device", "npu", "--dry-run"]) == 0
    report = capsys.readouterr().out
    assert "# layout" in report and "torch_npu" in report
    assert "# kernels: not those of the training, for on this machine: " in report


def test_warnings_about_which_a_user_can_do_nothing_are_hidden(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Also those that megatron-core gives when a command imports it, before there is a log."""
    from megatron_flashi2v.cli import convert

    def warn(argv: list[str]) -> int:
        for module in ("megatron.core.models.backends", "diffusers.utils"):
            warnings.warn_explicit("no Apex", UserWarning, "file.py", 1, module=module)
        return 0

    monkeypatch.setattr(convert, "main", warn)
    filters = list(warnings.filters)
    assert main(["convert"]) == 0
    assert len(recwarn) == 1 and warnings.filters == filters
