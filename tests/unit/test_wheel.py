"""The wheel, installed outside the checkout, holds all that the commands need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.checkpoints import checkpoint

from megatron_flashi2v.version import __version__

ROOT = Path(__file__).parents[2]
SOURCES = {"megatron_flashi2v": ROOT / "megatron_flashi2v", "flashi2v_kernels": ROOT / "kernels" / "flashi2v_kernels"}


def call(*words: object, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, since setuptools leaves its traces beside them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("megatron_flashi2v", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    call(sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", source / "dist", cwd=source)
    (found,) = (source / "dist").iterdir()
    return found


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    assert wheel.name == f"megatron_flashi2v-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in SOURCES.items() for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert any(name.endswith(".jinja") for name in there) and packed == there


def test_commands_run_from_an_installation(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check",
         "--no-compile", "--target", installed, wheel, cwd=tmp_path)  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    where = "import megatron_flashi2v, flashi2v_kernels as k; print(megatron_flashi2v.__file__, k.__file__)"
    for path in call(sys.executable, "-c", where, cwd=tmp_path, environment=environment).split():
        assert Path(path).is_relative_to(installed)
    command = installed / "bin" / "flashi2v"
    assert "usage: flashi2v COMMAND" in call(command, "--help", cwd=tmp_path, environment=environment)
    # Its explanations are read from the sources.
    assert "Recipe: a YAML file" in call(command, "train", "--help", cwd=tmp_path, environment=environment)
    checkpoint(tmp_path / "run")
    call(command, "convert", "--from", "megatron", "run", "--to", "diffusers", "export", cwd=tmp_path,
         environment=environment)  # fmt: skip
    assert (tmp_path / "export" / "transformer" / "config.json").exists()
