"""The files of a sampled video: which there are, whether they may be written, and writing them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import save

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.runtime.files import atomic_write_bytes, require_writable
from megatron_flashi2v.sampling.pipeline import SampledVideo
from megatron_flashi2v.sampling.video import StripRow, is_strip, write_comparison, write_mp4


@dataclass(frozen=True, kw_only=True)
class OutputFiles:
    """Files of one video; None is one that is not written."""

    video: Path
    strip: Path | None
    latents: Path | None

    @property
    def all(self) -> list[Path]:
        """In the order of writing: where the video stands, the others do."""
        return [path for path in (self.latents, self.strip, self.video) if path is not None]


def files_of_one(config: SampleConfig) -> OutputFiles:
    """What the flags name; the strip and the latents stand beside the video unless said otherwise."""
    video = config.output
    return OutputFiles(
        video=video,
        strip=config.strip[0] if config.strip else video.with_suffix(".png"),
        latents=None if config.latents is None else (*config.latents, video.with_suffix(".safetensors"))[0],
    )


def files_of_named(config: SampleConfig, name: str) -> OutputFiles:
    """The files of one video of many."""
    # Not with_suffix: an id may hold a dot.
    video, strip, latents = (config.output / f"{name}{suffix}" for suffix in (".mp4", ".png", ".safetensors"))
    return OutputFiles(
        video=video,
        strip=None if config.strip is None else strip,
        latents=None if config.latents is None else latents,
    )


def require_outputs(config: SampleConfig) -> None:
    """Refuse, before any work, outputs of one video that cannot be written, or that would replace what is not theirs.

    Raises:
        ConfigError: an output is an input or another output, cannot be written, or the strip, which no flag named,
            would replace a picture that is none of our strips.
    """
    files = files_of_one(config)
    named = {"--output": files.video, "--latents": files.latents, "--image": config.image, "--noise": config.noise,
             "--strip": files.strip}  # fmt: skip
    seen: dict[Path, str] = {}
    for flag, path in named.items():
        if path is None:
            continue
        if flag not in ("--image", "--noise"):
            require_writable(path, flag)
        earlier = seen.setdefault(path.resolve(), flag)
        if earlier != flag:
            cure = "name the strip with --strip" if flag == "--strip" else f"choose another {flag}"
            raise ConfigError(f"{flag} {path} is the file of {earlier} too, and would replace it; {cure}")
    if not config.strip and files.strip is not None and files.strip.exists() and not is_strip(files.strip):
        raise ConfigError(
            f"the strip of frames would replace {files.strip}, which flashi2v did not write; name another file with "
            "--strip"
        )


def write_files(video: SampledVideo, files: OutputFiles, prompt: str, fps: float, *, enlarge: int = 1) -> None:
    """Write the files of one video, each whole or not at all, and the video last.

    Args:
        video: decoded, of one sample.
        files: which, and where.
        prompt: shown in the strip.
        fps: of the video.
        enlarge: times that each pixel of the video is repeated along both sides.

    Raises:
        UserError: a file cannot be written.
    """
    assert video.frames_BTHWC is not None, "the rank that writes decodes"
    frames_THWC = video.frames_BTHWC[0]
    if files.latents is not None:
        atomic_write_bytes(files.latents, save({"latents_BCTHW": video.latents_BCTHW.contiguous()}))
    if files.strip is not None:
        rows = [StripRow(frames_THWC=frames_THWC, label=f"sample: {prompt}")]
        if video.images_BHWC is not None:
            image_THWC = np.asarray(video.images_BHWC[:1])
            rows.insert(0, StripRow(frames_THWC=image_THWC, label="image", captions=["condition"]))
        write_comparison(files.strip, rows)
    write_mp4(files.video, frames_THWC, fps, enlarge=enlarge)
