"""The commit that runs: a checkout's own, never that of a repository which merely surrounds the package."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megatron_flashi2v.runtime.provenance import source_commit


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_of_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    assert source_commit(package) is None
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    assert source_commit(package) is None  # not tracked: somebody else's repository
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_commit(package) == commit
    (package / "data.txt").write_text("made by a run")
    assert source_commit(package) == commit
    (package / "__init__.py").write_text("changed = True")
    assert source_commit(package) == f"{commit}+"
