"""The configuration of ``flashi2v sample``; field names are the flags' names and the recipe's keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from megatron_flashi2v.config.bounds import Above, AtLeast, Below, EndsWith, Within, check_bounds
from megatron_flashi2v.config.clips import Interpolation
from megatron_flashi2v.config.convert import parse_source
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import HoldsPath, Named, Only
from megatron_flashi2v.config.recipe import FlagNames
from megatron_flashi2v.config.train import ParallelArguments

SolverName = Literal["euler", "unipc", "dpm++"]
DEFAULT_SHIFT = 7.0
"""Shift of the sampler's noise levels, everywhere: FlashI2V's, see its main branch."""
DEFAULT_NAME = "{id}-{seed}"
"""Name of a video of many; `flashi2v evaluate` pairs such names with ID.mp4."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Image guidance; each paradigm reads the settings that it knows.

    Raises:
        ConfigError: a value is out of range.
    """

    cutoff_ratio: Annotated[float, Within(0, 1)] = 0.1
    """Share of the image's spectrum, from the lowest frequencies, kept out of the Fourier guidance."""
    image_noise: Annotated[float, AtLeast(0)] = 0.02
    """Level of the noise on the image's normalised latents, where the paradigm adds noise; 0.02 is that of Stable Video
    Diffusion."""

    def __post_init__(self) -> None:
        check_bounds(self, as_flags=False)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Sampler."""

    num_steps: Annotated[int, AtLeast(1)] = 50
    """Steps of the solver, each one call of the model (two with guidance)."""
    solver: SolverName = "euler"
    """Solver: FlashI2V's Euler steps, or a multistep scheduler of diffusers, which needs fewer steps."""
    guidance_scale: Annotated[float, AtLeast(0)] = 5.0
    """Classifier-free guidance; 1 turns it off and halves the time."""
    guidance_scale_2: Annotated[float | None, AtLeast(0)] = None
    """Guidance of the second of a pair of experts, the one for low noise; by default as of the first."""
    shift: Annotated[float, Above(0)] = DEFAULT_SHIFT
    """Shift of the noise levels toward noise; 1 is none."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(FlagNames):
    """Inputs, outputs and device.

    One video is made of ``image`` and ``prompt``, or many of ``requests``.

    Raises:
        ConfigError: a value is out of range, or flags of the two forms are mixed.
    """

    command: ClassVar[str] = "flashi2v sample"
    everyday: ClassVar[tuple[str, ...]] = ("load", "vae", "text_encoder", "tokenizer", "image", "prompt", "output")

    load: Path
    """Checkpoint: the folder given to `train --save` (its latest iteration), one of its iter_* folders, or a
    release, which holds what the encoders' flags name; of a pair of experts, the one for high noise."""
    low_noise: Path | None = None
    """Checkpoint or release of the second of a pair of experts, the one for low noise; the release of a pair holds
    both."""
    boundary_ratio: Annotated[float | None, Above(0), Below(1)] = None
    """Noise level that divides the experts: --load takes timesteps of at least 1000 times this, --low-noise those
    below; by default that of the release, or the one at which --sigma-min and --sigma-max divided their training."""
    vae: Path | None = None
    """Folder of the video VAE that prepared the training data (diffusers' layout), or of a release with it, or
    OWNER/NAME:SUBFOLDER of a Hub repository; by default the one of the release that --load names."""
    text_encoder: Path | None = None
    """Folder of the text encoder that prepared the training data (transformers' layout), likewise."""
    tokenizer: Path | None = None
    """Folder of the text encoder's tokenizer, likewise."""
    image_encoder: Path | None = None
    """Folder of the image encoder, where the model attends to its rows (wan_i2v), likewise."""
    image: Path | None = None
    """First frame: a png or jpg, or a video whose first frame is taken; only a text-to-video model needs none."""
    prompt: str | None = None
    """Description of the video."""
    output: Path
    """Video to write, a file that ends in .mp4; with --requests, the folder of the videos."""
    requests: Path | None = None
    """Make many videos, divided over the processes: a file of JSON lines or a .csv with id, image, prompt and, where
    wanted, seeds, negative_prompt, num_frames, height and width. Started again, it makes those that are missing."""
    name: str = DEFAULT_NAME
    """With --requests: name of each video in the folder, without .mp4; {id} and {seed} are filled in."""
    negative_prompt: str | None = None
    """Prompt to steer away from, or @FILE with it; "" is the empty prompt of training. By default that of the release,
    or a list of common flaws."""
    text_cleaning: Literal["full", "light"] | None = None
    """Cleaning of prompts; by default as recorded with the model: as the captions in training were."""
    interpolation: Interpolation | None = None
    """Interpolation of the image when it is resized; by default that of the training data, or bicubic."""
    num_frames: Annotated[int | None, AtLeast(1)] = None
    """Video frames; by default as in the training data, or 49."""
    height: Annotated[int | None, AtLeast(1)] = None
    """Rows in pixels; by default as in the training data, or 480."""
    width: Annotated[int | None, AtLeast(1)] = None
    """Columns in pixels; by default as in the training data, or 832."""
    fps: Annotated[float | None, Above(0)] = None
    """Frames per second of the mp4; by default as in the training data, or 16."""
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    image_settings: ImageSettings = field(default_factory=ImageSettings)
    batched_guidance: bool = False
    """Compute both guidance passes at once: faster on a large accelerator, twice the activations."""
    guidance_parallel_size: Annotated[int, Within(1, 2)] = 1
    """2: one group of ranks computes the pass with the prompt, another the one with the negative prompt."""
    seed: int = 0
    """Key of all noise; with --requests, of the requests that name no seeds."""
    noise: Path | None = None
    """Noise to start from instead: a .safetensors file with one tensor of the latents' size; with --requests, one for
    each video under its name."""
    vae_tiling: bool = False
    """Encode and decode in tiles that overlap (diffusers'): less memory, slightly other pixels."""
    weights: Literal["model", "ema"] = "model"
    """Weights of the checkpoint: the trained ones, or the moving average that `train --ema-decay` keeps."""
    base: Annotated[str | None, Named("base", "FORMAT:PATH"), HoldsPath()] = None
    """Weights beside which a checkpoint of adapters was trained, with a format of `flashi2v convert`; by default where
    they were in training."""
    low_noise_base: Annotated[str | None, Named("low_noise_base", "FORMAT:PATH"), HoldsPath()] = None
    """The same of --low-noise; by default --base where both experts were trained beside the same weights."""
    adapter_scale: float = 1.0
    """Factor of the products that a checkpoint's adapters add; 0 samples without them."""
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """Device; auto takes the first that is there."""
    bf16: bool = False
    """Run the transformer and the text encoder in bfloat16."""
    attention_backend: str = "auto"
    """Implementation of attention: auto, torch_sdpa or reference."""
    parallel: Annotated[ParallelArguments, Only(
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "pipeline_layer_split", "context_parallel_size",
        "context_parallel_algo", "ulysses_degree", "sequence_parallel",
    )] = field(default_factory=ParallelArguments)  # fmt: skip
    strip: Annotated[tuple[Annotated[Path, EndsWith(".png")], ...] | None, Named("strip", "[FILE]")] = None
    """PNG strip of frames to write; by default beside the output, with the suffix .png. With --requests there is none
    unless --strip, without a file, asks for one beside each video."""
    enlarge: Annotated[int, AtLeast(1)] = 1
    """Repeat each pixel of the mp4 so many times along both sides, so that a small sample can be watched."""
    latents: Annotated[
        tuple[Annotated[Path, EndsWith(".safetensors")], ...] | None, Named("latents", "[FILE]")
    ] = None
    """Also write the sampled latents, fp32 and normalised, to this file; without a file, beside each video."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.requests is None:
            self._check_one_video()
        else:
            self._check_many_videos()
        self._check_guidance()
        self._check_bases()
        if not math.isfinite(self.adapter_scale):
            raise ConfigError(f"--adapter-scale is {self.adapter_scale}; it must be a number")

    def _check_bases(self) -> None:
        for flag, base in (("--base", self.base), ("--low-noise-base", self.low_noise_base)):
            if base is not None:
                parse_source(flag, base)
        if self.low_noise_base is not None and self.low_noise is None:
            raise ConfigError(
                f"--low-noise-base {self.low_noise_base} is the base of the second of a pair of experts; give "
                "--low-noise too, or leave it out"
            )

    def _check_one_video(self) -> None:
        if self.prompt is None:
            raise ConfigError("--prompt must be given, or --requests FILE for many videos (see flashi2v sample --help)")
        if self.name != DEFAULT_NAME:
            raise ConfigError(f"--name {self.name} names the videos of --requests, which is not given; leave it out")
        rule = EndsWith(".mp4")
        if not rule.holds(self.output):
            raise ConfigError(f"--output is {self.output}; it must be {rule.rule} (a folder needs --requests)")
        for flag, paths in (("--strip", self.strip), ("--latents", self.latents)):
            if paths is not None and len(paths) > 1:
                raise ConfigError(f"{flag} names {len(paths)} files, but there is one video; give one")

    def _check_many_videos(self) -> None:
        for flag, value in (("--image", self.image), ("--prompt", self.prompt)):
            if value is not None:
                raise ConfigError(f"{flag} {value} belongs to one video; with --requests, write it into the requests")
        if self.output.suffix.lower() == ".mp4":
            raise ConfigError(f"--output is {self.output}; with --requests it must be a folder")
        for flag, paths in (("--strip", self.strip), ("--latents", self.latents)):
            if paths:
                raise ConfigError(
                    f"{flag} {paths[0]} names one file, but --requests makes many videos; give {flag} without a file: "
                    "there will be one beside each video"
                )

    def _check_guidance(self) -> None:
        if self.guidance_parallel_size == 1:
            return
        if max(self.sampler.guidance_scale, self.sampler.guidance_scale_2 or 0) <= 1:
            raise ConfigError(
                f"--guidance-parallel-size {self.guidance_parallel_size} divides guidance's two passes, but "
                f"--guidance-scale {self.sampler.guidance_scale:g} makes one; leave it out"
            )
        if self.batched_guidance:
            raise ConfigError(
                f"--guidance-parallel-size {self.guidance_parallel_size} computes guidance's passes on different "
                "ranks, --batched-guidance on the same; give one of them"
            )


def check_sampling_settings(
    *, num_steps: int, guidance_scale: float, shift: float, guidance_scale_2: float | None = None
) -> None:
    """Refuse settings that the sampler cannot use.

    Raises:
        ConfigError: names the setting, its value and the rule.
    """
    settings = SamplerSettings(
        num_steps=num_steps, guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2, shift=shift
    )
    check_bounds(settings, as_flags=False)
