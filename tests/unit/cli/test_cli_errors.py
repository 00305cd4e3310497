"""One line, told by one process, with a true exit code: alone, among ranks that fail alike, beside one that failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_flashi2v.cli import errors
from megatron_flashi2v.cli.errors import tell_error, tell_interrupt
from megatron_flashi2v.cli.main import main, run_command
from megatron_flashi2v.config.errors import ConfigError, PeerError, UserError


def torchrun(rank: int, world_size: int = 2) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "x"}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for, at once."""
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("environ, error, said, waited", [
    ({}, ConfigError("--lr is\nwrong"), "flashi2v train: error: --lr is wrong\n", []),
    (torchrun(0), ConfigError("--lr"), "flashi2v train: error: --lr\n", []),
    (torchrun(1), ConfigError("--lr"), "flashi2v train: error: [rank 1] --lr\n", [errors.PATIENCE_S]),
    (torchrun(0), PeerError("gone"), "flashi2v train: error: gone\n", [errors.PEER_PATIENCE_S]),
    ({"RANK": "one"}, ConfigError("RANK is 'one'"), "flashi2v train: error: RANK is 'one'\n", []),
])
def test_who_speaks_and_when(
    environ: dict[str, str], error: UserError, said: str, waited: list[float], waits: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tell_error("train", error, environ) == error.exit_code
    assert capsys.readouterr().err == said
    assert waits == waited


def test_a_rank_that_is_stopped_while_it_waits_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        tell_error("train", ConfigError("--lr"), torchrun(3, 4))
    assert stop.value.code == 2 and capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_processes_with_one_mistake_say_it_once() -> None:
    """What torchrun does, but for its own report: it stops the others once one has failed."""
    command = [sys.executable, "-m", "megatron_flashi2v", "train", "--tensor-model-parallel-size", "3"]
    first, second = (
        subprocess.Popen(command, env={**os.environ, **torchrun(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    )
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 2
    assert said == ("flashi2v train: error: --tensor-model-parallel-size 3 must divide num_attention_heads 8; "
                    "choose 2\n")
    time.sleep(2)  # the second may still be starting
    assert second.poll() is None
    second.terminate()
    assert second.communicate(timeout=60)[1] == "" and second.returncode == 2


@pytest.mark.parametrize("rank, said", [(0, "flashi2v train: interrupted\n"), (1, "")])
def test_ctrl_c_is_no_traceback(
    rank: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_flashi2v.cli import train

    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    for name, value in torchrun(rank).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "main", interrupted)
    assert run_command("train", []) == 130
    assert capsys.readouterr().err == said
    assert tell_interrupt("train", {}) == 130


# A process of HCCL's, whose package waits at exit for what is queued on the device.
WAITING_AT_EXIT = """
import atexit, sys, time
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_flashi2v.cli import train
from megatron_flashi2v.cli.main import run_command
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.device import CpuDevice
from megatron_flashi2v.runtime.distributed import process_group
from megatron_flashi2v.runtime.launch import LaunchEnvironment

def wait():
    sys.stdout.write("waits")
    sys.stdout.flush()
    time.sleep(100 if ERROR else 0)

def start(launch, device, timeout_minutes):
    dist.init_process_group("hccl", store=FakeStore(), rank=0, world_size=2)

def main(argv):
    with process_group(LaunchEnvironment(), CpuDevice(), start=start):
        sys.stdout.write("done ")
        if ERROR:
            raise ERROR
    return 0

ERROR = eval(sys.argv[1])
fake = dist.Backend._plugins["FAKE"]
dist.Backend.register_backend("hccl", fake.creator_fn, extended_api=fake.extended_api, devices=["cpu"])
atexit.register(wait)
train.main = main
sys.exit(run_command("train", []))
"""


@pytest.mark.parametrize("error, code, told", [
    ("ValueError('planted')", 1, "ValueError: planted"),
    ("ConfigError('--lr')", 2, "flashi2v train: error: --lr"),
    ("KeyboardInterrupt()", 130, "flashi2v train: interrupted"),
    ("SystemExit(7)", 7, ""),
    ("None", 0, ""),
])
def test_a_rank_that_fails_with_hccl_does_not_wait_for_its_device(error: str, code: int, told: str) -> None:
    done = subprocess.run([sys.executable, "-c", WAITING_AT_EXIT, error], capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip
    assert done.returncode == code and told in done.stderr, done.stderr
    assert done.stdout == ("done " if code else "done waits")


@pytest.mark.parametrize("argv, said", [
    (["trian"], "flashi2v: error: unknown command 'trian'; did you mean train? (see flashi2v --help)\n"),
    (["train", "--datapath", "x"], "flashi2v train: error: unknown flag --datapath; did you mean --data-path?\n"),
    (["prepare", "--text-lenght", "3"],
     "flashi2v prepare: error: unknown flag --text-lenght; did you mean --text-length?\n"),
    (["sample", "--outptu", "a.mp4"], "flashi2v sample: error: unknown flag --outptu; did you mean --output?\n"),
    (["convert", "--form", "megatron", "x"], "flashi2v convert: error: unknown flag --form; did you mean --from?\n"),
    (["convert", "--from", "megatron", "x"],
     "flashi2v convert: error: --to must be given (see flashi2v convert --help)\n"),
    (["sample"], "flashi2v sample: error: --load, --output must be given "
                 "(see flashi2v sample --help)\n"),
])
def test_every_command_tells_a_bad_flag_in_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == said
