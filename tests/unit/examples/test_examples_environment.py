"""The set-up of the scripts: the tested torch where there is none, and never another in the place of the user's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OURS = "2.13.0+cpu"
# A python that knows a file's version of torch, and whose pip installs torch by writing that file.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *m.version*) cat torch ;;
    *pip*) [ ! -e broken ] && echo "${{@:5}}" >>installed
           case "$*" in *" torch") [ ! -e broken ] && {{ [ -e torch ] || echo {OURS} >torch; }} ;; esac ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("setup.py", "constraints.txt", "constraints-torch.txt", "examples/environment.sh"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "venv").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def set_up(folder: Path, target: str) -> tuple[int, list[bool]]:
    """The exit code, and for each installation whether torch was pinned."""
    environment = {**os.environ, "VIRTUAL_ENV": str(folder / "venv"), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    script = f"set -euo pipefail; . ./environment.sh; ensure_environment '{target}'"
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, check=False)
    log = folder / "installed"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return done.returncode, ["constraints-torch.txt" in line for line in lines]


def test_the_tested_torch_is_installed_where_there_is_none(folder: Path) -> None:
    assert set_up(folder, ".") == (0, [True, True])
    assert set_up(folder, ".") == (0, [])  # once
    assert set_up(folder, ".[test]") == (0, [True, True])


@pytest.mark.parametrize("before", ["nothing", "ours", "a failure"])
def test_a_torch_of_the_user_stays(folder: Path, before: str) -> None:
    if before == "ours":
        assert set_up(folder, ".")[0] == 0
    elif before == "a failure":
        (folder / "broken").touch()
        assert set_up(folder, ".")[0] != 0
        (folder / "broken").unlink()
    (folder / "torch").write_text("2.7.1\n")
    assert set_up(folder, ".[test]") == (0, [False])
