"""``flashi2v torchrun``: one line for one mistake, the rank's own exit code, signals passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_flashi2v.cli.main import main
from megatron_flashi2v.cli.torchrun import exit_code_of, signals_passed_on


def test_a_mistake_is_one_line_of_one_rank_and_the_exit_code_is_true(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["torchrun", "--nproc-per-node", "2", "train", "--config", "nowhere.yaml"]) == 2
    assert capfd.readouterr().err == (
        "flashi2v train: error: --config nowhere.yaml: cannot be read (No such file or directory)\n"
    )


@pytest.mark.parametrize("argv, said", [
    (["--nproc-per-node", "2", "trian"], "'trian' is no command to start; did you mean train?"),
    (["torchrun", "train"], "'torchrun' is no command to start"),
])
def test_an_unknown_command_starts_nothing(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torchrun", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("exitcode, code, said", [
    (77, 77, ""),
    (-9, 137, "flashi2v torchrun: error: rank 3 (process 12) was ended by SIGKILL\n"),
])
def test_the_code_of_the_first_rank_that_failed(
    exitcode: int, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = ProcessFailure(local_rank=1, pid=12, exitcode=exitcode, error_file="<N/A>")
    assert exit_code_of(ChildFailedError("train", {3: failure})) == code
    assert capsys.readouterr().err == said


CHILD = "import signal, sys; signal.signal({0}, lambda *_: sys.exit(77)); print(flush=True); signal.pause()"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_go_to_the_processes_that_were_started(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with signals_passed_on():
        child = subprocess.Popen([sys.executable, "-c", CHILD.format(int(number))], stdout=subprocess.PIPE,
                                 start_new_session=True)  # fmt: skip
        assert child.stdout is not None and child.stdout.readline()
        os.kill(os.getpid(), number)
        assert child.wait(20) == 77
        monkeypatch.setattr(psutil.Process, "children", lambda self: [])  # other tests' may live on
        with pytest.raises(SystemExit) as stop:  # while nothing runs yet there is nobody to ask
            os.kill(os.getpid(), number)
        assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before
