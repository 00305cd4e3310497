"""The training command on a device called npu, which is emulated on the CPU: same numbers, NPU implementations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.layouts import assert_same_metrics
from helpers.stand_in import emulated_npus
from helpers.synthetic_data import write_synthetic

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot emulate a device in Python",
)

LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH = (4, 2, 4, 4), 8, 6
FLAGS = {
    "model": "tiny", "num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 2,
    "latent-channels": LATENT_SHAPE[0], "text-dim": TEXT_DIM, "text-length": TEXT_LENGTH, "seed": 5,
    "train-iters": 10, "global-batch-size": 2, "lr": 1e-2,
}
COMMAND = ["-m", "megatron_flashi2v", "train", *(f"--{name}={value}" for name, value in FLAGS.items())]
# Counts the operators' calls in the process that trains, and writes them down at its end.
COUNTING = """
import atexit, json, os, sys, torch_npu
from torch_npu.operators import calls
atexit.register(lambda: open(os.environ["CALLS"], "w").write(json.dumps(calls)))
from megatron_flashi2v.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)


def run(command: list[object], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True,
                          timeout=400, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def on_cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("cpu") / "run"
    run([*COMMAND, "--data-path", data, "--device=cpu", "--save", save])
    return save


def test_ten_steps_equal_the_cpus_on_npu_kernels(data: Path, on_cpu: Path, tmp_path: Path) -> None:
    save, calls_file = tmp_path / "run", tmp_path / "calls.json"
    environment = {**emulated_npus(1), "CALLS": str(calls_file)}
    flags = ["--data-path", data, "--device=npu", "--distributed-backend=gloo", "--save", save]
    report = run(["-c", COUNTING, *COMMAND[2:], *flags], environment)
    for line in ("npu:0: Ascend910B3", "torch_npu 2.13.0", "kernel attention: npu_fusion_attention",
                 "kernel rms_norm: npu_rms_norm", "kernel qk_norm_rope: npu_rms_norm_rotary_mul",
                 "kernel fourier_highpass: matmul_dft"):
        assert line in report
    assert_same_metrics(save, on_cpu)
    calls = json.loads(calls_file.read_text())
    # 10 iterations of 2 microbatches through 2 blocks, each with self- and cross-attention
    attentions = 10 * 2 * 2 * 2
    assert calls["npu_fusion_attention"] == calls["npu_fusion_attention_grad"] == attentions
    assert calls["npu_rms_norm"] == calls["npu_rms_norm_backward"] == 2 * attentions  # queries and keys
    assert calls["npu_rotary_mul"] == 2 * attentions  # those of self-attention, forward and backward


def test_two_tensor_parallel_ranks(data: Path, on_cpu: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    # as under a launcher that shows each process its own card only
    environment = {**emulated_npus(1), "ASCEND_RT_VISIBLE_DEVICES": "0"}
    report = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *COMMAND, "--data-path", data,
         "--device=npu", "--distributed-backend=gloo", "--save", save, "--tensor-model-parallel-size=2",
         "--sequence-parallel"],
        environment,
    )
    for line in ("kernel attention: npu_fusion_attention", "kernel rms_norm: torch (",
                 "npu_rms_norm: has no partial_sums on npu", "kernel qk_norm_rope: npu_rms_norm_rotary_mul"):
        assert line in report
    assert_same_metrics(save, on_cpu)
