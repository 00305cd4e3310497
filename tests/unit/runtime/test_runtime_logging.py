"""Log lines and progress: who says what, and where."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator

import pytest
from rich.console import Console

from megatron_flashi2v.runtime.logging import AGREED, setup_logging
from megatron_flashi2v.runtime.progress import format_rate, progress

LOADING_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"

log = logging.getLogger("megatron_flashi2v.test")


@pytest.fixture(autouse=True)
def restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(LOADING_BARS, "")  # so that it is put back
    monkeypatch.delenv(LOADING_BARS)
    root, package = logging.getLogger(), logging.getLogger("megatron_flashi2v")
    captured = warnings.showwarning
    handlers, level = list(root.handlers), package.level
    warnings_level = logging.getLogger("py.warnings").level
    yield
    logging.captureWarnings(False)
    warnings.showwarning = captured
    root.handlers[:] = handlers
    package.setLevel(level)
    logging.getLogger("py.warnings").setLevel(warnings_level)


def test_rank_0_informs_and_the_others_warn(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0)
    log.info("from rank zero")
    log.debug("hidden")
    setup_logging(3)  # replaces: one line each, not two
    log.info("hidden")
    log.warning("said by rank zero too", extra=AGREED)
    log.warning("from rank three: 100%")
    output, errors = capsys.readouterr()
    assert output == ""
    lines = errors.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("INFO from rank zero")
    assert lines[1].endswith("WARNING [rank 3] from rank three: 100%")


def test_verbose_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(1)
    warnings.warn("same on all ranks", stacklevel=1)
    setup_logging(1, verbose=True)
    log.debug("detail")
    warnings.warn("shown when verbose", stacklevel=1)
    errors = capsys.readouterr().err
    assert "same on all ranks" not in errors
    assert "DEBUG [rank 1] detail" in errors and "shown when verbose" in errors


NOISE = [(UserWarning, "megatron.core.optimizer"), (FutureWarning, "torch.distributed.c10d_logger")]


@pytest.mark.parametrize("verbose", [False, True])
def test_what_users_can_do_nothing_about_is_kept_back(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    warnings.resetwarnings()  # pytest's own settings; it puts them back
    setup_logging(0, verbose=verbose)
    for category, module in NOISE:
        warnings.warn_explicit("noise", category, "file.py", 1, module=module)
    warnings.warn_explicit("news", UserWarning, "file.py", 1, module="megatron_flashi2v.training")
    errors = capsys.readouterr().err
    assert errors.count("news") == 1 and errors.count("noise") == (len(NOISE) if verbose else 0)
    assert os.environ.get(LOADING_BARS) == (None if verbose else "1")


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megatron_flashi2v")
    clock, console = Clock(), plain_console()
    with progress("train", 10, initial=4, console=console, interval_s=10, clock=clock) as report:
        for step in range(6):
            clock.now += 4
            report.advance(note=f"loss {step}" if step < 5 else None)
    assert caplog.messages == [
        "train: 7/10, 4.0 s per step, 0:00:12 left, loss 2",
        "train: 10/10, 4.0 s per step, 24 s in all, loss 4",
    ]
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_lines_state_where_a_failing_loop_stopped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megatron_flashi2v")
    clock = Clock()
    quiet = plain_console()
    with pytest.raises(ValueError), progress("prepare", 8, unit="clips", console=quiet, clock=clock) as bar:
        clock.now += 0.5
        bar.advance(4)
        raise ValueError
    assert caplog.messages == ["prepare: 4/8, 8.00 clips/s, 0:00:00 left"]


def test_bar_on_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with progress("train", 10, initial=4, console=console) as report:
        report.advance(6, note="loss 0.5")
    text = file.getvalue()
    assert "train" in text and "10/10" in text and "loss 0.5" in text and "\x1b[" in text


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress("train", 2, rank=1, console=plain_console()) as report:
        report.advance(2, note="x")
    assert caplog.messages == []


def test_rates() -> None:
    assert format_rate(3.2, "steps") == "3.20 steps/s"
    assert format_rate(0.08, "clips") == "12.5 s per clip"
