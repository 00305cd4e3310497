"""The version of the running software."""

from __future__ import annotations

import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def source_commit(folder: Path = _PACKAGE) -> str | None:
    """The git commit of a source folder, with ``+`` if tracked files have changed since.

    Args:
        folder: a package's folder.

    Returns:
        None if git is missing or does not track the folder: an installed package inside another repository must not
        get that repository's commit.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()
