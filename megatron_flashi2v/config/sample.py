"""The configuration of ``flashi2v sample``; field names are the flags' names."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.train import ParallelArguments

DEFAULT_SHIFT = 7.0
"""Shift of the sampler's noise levels, everywhere: FlashI2V's, see its main branch."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """A user's settings of how a video follows its image; each paradigm reads those that it knows.

    Attributes:
        cutoff_ratio: share of the image's spectrum, from the lowest frequencies, kept out of the Fourier guidance.
        image_noise: level of the noise on the image's normalised latents; 0.02 is that of Stable Video Diffusion.

    Raises:
        ConfigError: a value is out of range.
    """

    cutoff_ratio: float = 0.1
    image_noise: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.cutoff_ratio <= 1:
            raise ConfigError(f"cutoff_ratio is {self.cutoff_ratio}; it must be between 0 and 1")
        if not (math.isfinite(self.image_noise) and self.image_noise >= 0):
            raise ConfigError(f"image_noise is {self.image_noise}; it must be a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """One video from an image and a prompt."""

    load: Path
    """Checkpoint: the folder given to `train --save` (its latest iteration) or one of its iter_* folders."""
    vae: Path
    """Folder of the video VAE that prepared the training data (diffusers' layout)."""
    text_encoder: Path
    """Folder of the text encoder that prepared the training data (transformers' layout)."""
    tokenizer: Path
    """Folder of the text encoder's tokenizer."""
    prompt: str
    """What happens in the video."""
    output: Path
    """The mp4 to write."""
    image: Path | None = None
    """First frame: a png or jpg, or a video whose first frame is taken; only a text-to-video model goes without."""
    negative_prompt: str | None = None
    """What guidance steers away from; "" is the empty prompt of training. By default a list of common flaws."""
    num_frames: int | None = None
    """Video frames; by default as in the training data, or 49."""
    height: int | None = None
    """Pixels; by default as in the training data, or 480."""
    width: int | None = None
    """Pixels; by default as in the training data, or 832."""
    fps: float | None = None
    """Frames per second of the mp4; by default as in the training data, or 16."""
    num_steps: int = 50
    """Euler steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 turns it off and halves the time."""
    batched_guidance: bool = False
    """Compute both guidance passes at once: faster on a large accelerator, twice the activations."""
    shift: float = DEFAULT_SHIFT
    """Shift of the noise levels toward noise."""
    cutoff_ratio: float = 0.1
    """Share of the image's spectrum, from the lowest frequencies, kept out of the Fourier guidance."""
    image_noise: float = 0.02
    """Level of the noise on the image's latents, where the paradigm adds noise."""
    seed: int = 0
    """Keys all noise."""
    weights: Literal["model", "ema"] = "model"
    """ema: the moving average of the weights that `train --ema-decay` keeps."""
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """auto takes the first that is there."""
    bf16: bool = False
    """Run the transformer and the text encoder in bfloat16."""
    attention_backend: str = "auto"
    """Implementation of attention: auto, torch_sdpa or reference."""
    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices (start all of them with torchrun)."""
    sequence_parallel: bool = False
    """Shard tokens over the tensor-parallel processes between the matrix products."""
    pipeline_model_parallel_size: int = 1
    """Stages of the model, for one that does not fit otherwise; only one works at a time."""
    pipeline_layer_split: str | None = None
    """Blocks of every stage, such as 7,8,8,7; by default as even as can be."""
    context_parallel_size: int = 1
    """Processes that share one video's tokens."""
    context_parallel_algo: Literal["ulysses", "ring", "usp"] = "ulysses"
    """How context-parallel processes exchange."""
    ulysses_degree: int | None = None
    """Ulysses processes inside `usp`."""
    strip: Path | None = None
    """PNG strip of frames to write; by default beside the output, with the suffix .png."""
    latents: Path | None = None
    """Also write the sampled latents, fp32 and normalised, to this .safetensors file."""

    def __post_init__(self) -> None:
        check_sampling_settings(
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            shift=self.shift,
        )
        _ = self.image_settings
        for name in ("num_frames", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if self.output.suffix.lower() != ".mp4":
            raise ConfigError(f"output is {self.output}; it must end in .mp4")
        if self.strip is not None and self.strip.suffix.lower() != ".png":
            raise ConfigError(f"strip is {self.strip}; it must end in .png")
        if self.latents is not None and self.latents.suffix.lower() != ".safetensors":
            raise ConfigError(f"latents is {self.latents}; it must end in .safetensors")

    @property
    def parallel(self) -> ParallelArguments:
        """How the model is divided over the processes."""
        names = {field.name for field in dataclasses.fields(ParallelArguments)}
        return ParallelArguments(**{name: value for name, value in vars(self).items() if name in names})

    @property
    def image_settings(self) -> ImageSettings:
        """What the model's paradigm may be asked to do with the image.

        Raises:
            ConfigError: a value is out of range.
        """
        return ImageSettings(cutoff_ratio=self.cutoff_ratio, image_noise=self.image_noise)


def check_sampling_settings(*, num_steps: int, guidance_scale: float, shift: float) -> None:
    """Refuse settings that the sampler cannot use.

    Raises:
        ConfigError: names the setting, its value and the rule.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}; it must be at least 1")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ConfigError(
            f"guidance_scale is {guidance_scale}; it must be a number of at least 0 (1 is no guidance)"
        )
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(f"shift is {shift}; it must be above 0 (1 is no shift)")
