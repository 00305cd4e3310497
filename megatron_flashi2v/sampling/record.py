"""``sampling.json`` beside many videos: the settings and requests that they were made from, so that a second start goes
on where the first one ended, and replaces nothing else."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.config.fields import spelling
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object
from megatron_flashi2v.runtime.text import encodable
from megatron_flashi2v.sampling.outputs import OutputFiles
from megatron_flashi2v.sampling.requests import Job
from megatron_flashi2v.sampling.session import Source, VideoShape

RECORD_FILE = "sampling.json"
KIND = "videos of flashi2v sample"
FREE = {
    "requests", "output", "name", "image", "prompt", "negative_prompt", "seed", "num_frames", "height", "width", "fps",
    "batched_guidance", "guidance_parallel_size", "device", *vars(ParallelArguments()),
}  # fmt: skip
"""Flags that a second start may change: those that stand with each video, and those that decide no video."""


@dataclass(frozen=True, kw_only=True)
class PlannedVideo:
    """A video that a request asks for, with all that is resolved of it."""

    job: Job
    shape: VideoShape
    files: OutputFiles
    negative_prompt: str

    @property
    def description(self) -> dict[str, Any]:
        """What it is made from, JSON-ready."""
        request = self.job.request
        return {
            "id": request.id, "seed": self.job.seed,
            "image": None if request.image is None else encodable(str(request.image.resolve())),
            "prompt": request.prompt, "negative_prompt": self.negative_prompt, "num_frames": self.shape.num_frames,
            "height": self.shape.height, "width": self.shape.width, "fps": self.shape.fps,
        }


def deciding_settings(config: SampleConfig, source: Source) -> dict[str, Any]:
    """The flags that decide every video, by name."""
    values = {name: value for name, value in flat_values(config).items() if name not in FREE}
    files = {**vars(source.frozen), "noise": config.noise, "load": source.folder}
    values |= {name: None if path is None else str(path.resolve()) for name, path in files.items()}
    low_noise = source.models.low_noise
    if low_noise is not None:
        values |= {"low_noise": str(low_noise.folder.resolve()), "boundary_ratio": low_noise.boundary_ratio}
    if values["image_encoder"] is None:  # records of earlier versions do not have it
        del values["image_encoder"]
    written = {name: getattr(config, name) is not None for name in ("strip", "latents")}
    return {**values, **written}


def begin(folder: Path, settings: Mapping[str, Any], videos: Sequence[PlannedVideo]) -> list[int]:
    """Find what is left to make, and record what all of it is made from.

    Args:
        folder: ``--output``; made where it is not there.
        settings: from :func:`deciding_settings`.
        videos: all that are asked for.

    Returns:
        Places of the videos that are not there yet.

    Raises:
        UserError: the folder's videos have other settings or come from other requests, a file would be replaced that
            flashi2v did not write, or the folder cannot be written.
    """
    path = folder / RECORD_FILE
    known: dict[str, Any] = {}
    if path.exists():
        record = read_json_object(path, error=DataError)
        if record.get("kind") != KIND or not isinstance(record.get("videos"), dict):
            raise DataError(f"{path} is not a record of flashi2v sample; give another --output")
        _require_same(folder, record.get("settings"), settings)
        known = record["videos"]
    missing = []
    for place, video in enumerate(videos):
        name = video.job.name
        for file in video.files.all:
            if name not in known and file.exists():
                raise DataError(f"{file}: it would be replaced, and flashi2v did not write it; give another --output")
        if not video.files.video.exists():
            missing.append(place)
        elif known[name] != video.description:
            raise DataError(f"{video.files.video}: {_difference(known[name], video.description)}; give another id, or "
                            "another --output, or remove the file")  # fmt: skip
    atomic_write_json(path, {
        "kind": KIND, "settings": dict(settings),
        "videos": {**known, **{video.job.name: video.description for video in videos}},
    })  # fmt: skip
    _remove_unfinished([videos[place].files for place in missing])
    return missing


def _require_same(folder: Path, earlier: Any, settings: Mapping[str, Any]) -> None:
    earlier = earlier if isinstance(earlier, dict) else {}
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise DataError(
                f"{folder}: its videos were made with {spelling(name)} {earlier.get(name)}, and it is {value} now; "
                "give the same, or another --output"
            )


def _difference(earlier: Any, now: Mapping[str, Any]) -> str:
    earlier = earlier if isinstance(earlier, dict) else {}
    name = next(name for name in now if earlier.get(name) != now[name])
    return f"it was made with the {name} {earlier.get(name)!r}, and the request has {now[name]!r} now"


def _remove_unfinished(files: Sequence[OutputFiles]) -> None:
    """What a killed run was writing, see :func:`~megatron_flashi2v.runtime.files.atomic_write_bytes`."""
    names = {path for one in files for path in one.all}
    for folder in {path.parent for path in names}:
        with contextlib.suppress(FileNotFoundError):
            for path in folder.iterdir():
                found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.partial", path.name)
                if found and folder / found[1] in names:
                    path.unlink(missing_ok=True)
