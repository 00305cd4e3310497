"""--use-mindspeed with stand-ins for torch_npu and MindSpeed: the same numbers, a clean command line, plain errors."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.layouts import assert_same_metrics
from helpers.stand_in import emulated_npus
from helpers.synthetic_data import write_synthetic
from helpers.train_command import FLAGS, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH

from megatron_flashi2v.runtime.mindspeed import find_replaced

STAND_IN = Path(__file__).parent / "stand_in_mindspeed"
COMMAND = ["-m", "megatron_flashi2v", "train",
           *(f"--{name}={value}" for name, value in FLAGS.items() if name != "device"), "--train-iters=3"]  # fmt: skip
# Runs the command, then looks at what is left of it.
LOOKING = """
import sys
argv = list(sys.argv)
from megatron_flashi2v.cli.main import main
code = main(sys.argv[1:])
assert sys.argv == argv, sys.argv
import torch, importlib.metadata
from flashi2v_kernels.registry import specs_of, _package_obstacle
assert importlib.metadata.version("transformer_engine") == "0.0" and "transformer_engine" in sys.modules
assert torch.compile.__module__ == "mindspeed.megatron_adaptor"
# what torch_npu put into torch.cuda is there again, after our own exchange
assert torch.cuda.synchronize is torch.npu.synchronize and torch.cuda.current_device() == 0
assert torch.ones(1, device="cuda").to("cuda:0").is_cuda
[spec] = [spec for spec in specs_of("attention") if spec.name == "transformer_engine"]
assert "not installed" in (_package_obstacle(spec) or ""), _package_obstacle(spec)
from mindspeed.megatron_adaptor import ARGS
assert ARGS.context_parallel_size == 1 and not hasattr(ARGS, "hidden_size"), ARGS
sys.exit(code)
"""

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot emulate a device in Python",
)


def with_mindspeed(folder: Path = STAND_IN) -> dict[str, str]:
    environment = emulated_npus(1)
    return {**environment, "PYTHONPATH": f"{folder}{os.pathsep}{environment['PYTHONPATH']}"}


def run(command: list[object], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True,
                          timeout=400, check=False)


@pytest.fixture
def no_transformer_engine() -> None:
    try:
        importlib.metadata.distribution("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return
    pytest.skip("Transformer Engine is installed, so that an empty one in its place proves nothing")


def test_training_with_mindspeed(tmp_path: Path, no_transformer_engine: None) -> None:
    data = write_synthetic(tmp_path / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)
    on_cpu = run([*COMMAND, "--data-path", data, "--device=cpu", "--save", tmp_path / "cpu"])
    assert on_cpu.returncode == 0, on_cpu.stderr
    flags = ["--data-path", data, "--device=npu", "--distributed-backend=gloo", "--use-mindspeed",
             "--save", tmp_path / "npu"]  # fmt: skip
    done = run(["-c", LOOKING, *COMMAND[2:], *flags], with_mindspeed())
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-6000:]
    words = " ".join(report.split())
    for name in ("importlib.metadata.version", "torch.Tensor.type", "torch.compile",
                 "megatron.core.parallel_state.initialize_model_parallel",
                 "megatron.core.transformer.transformer_config.TransformerConfig.__post_init__"):  # fmt: skip
        assert name in words
    assert "MindSpeed put empty modules in place of: apex, transformer_engine" in words
    assert_same_metrics(tmp_path / "npu", tmp_path / "cpu")


def refused(environment: dict[str, str]) -> str:
    done = run([*COMMAND, "--data-path=absent", "--device=npu", "--use-mindspeed"], environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    return line


def test_mindspeed_that_is_not_there_or_of_another_branch(tmp_path: Path) -> None:
    cure = "install MindSpeed's branch core_r0.16.0, or leave --use-mindspeed out: plain torch_npu works too"
    line = refused(emulated_npus(1))
    assert line.endswith(f"--use-mindspeed: MindSpeed is not installed; {cure}")
    other = tmp_path / "other"
    shutil.copytree(STAND_IN, other)
    metadata = other / "mindspeed-0.16.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.16.0", "0.12.1"))
    line = refused(with_mindspeed(other))
    assert "MindSpeed 0.12.1 is made for megatron-core 0.12, but 0.16" in line and line.endswith(cure)


def test_mindspeed_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(STAND_IN, broken)
    (broken / "mindspeed" / "megatron_adaptor.py").write_text("from megatron.core import nothing_of_this_name\n")
    line = refused(with_mindspeed(broken))
    assert "MindSpeed 0.16.0 cannot be loaded (ImportError: " in line and "core_r0.16.0" in line


@pytest.mark.parametrize("changes, is_dummy", [
    ({"__file__": "mindspeed.dummy_module.py", "__spec__": ModuleSpec("a_dummy", None)}, True),  # core_r0.16.0
    ({}, True),  # a bare module
    ({"__spec__": ModuleSpec("a_dummy", None)}, False),  # a namespace package, until Python 3.10
])
def test_empty_modules_are_told(monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], is_dummy: bool) -> None:
    before = set(sys.modules)
    module = ModuleType("a_dummy")
    vars(module).update(changes)
    monkeypatch.setitem(sys.modules, "a_dummy", module)
    assert find_replaced(before).dummies == (("a_dummy",) if is_dummy else ())
