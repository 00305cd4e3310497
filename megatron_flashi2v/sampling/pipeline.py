"""From an image and a prompt to a video: encode the conditions, integrate the flow, decode.

The pipeline calls the diffusion transformer as a function of tensors (:data:`VelocityFunction`): it is the same for
one device and for a sharded model.

Shape suffixes: B samples, C latent channels (3 colours in pixel space), T latent frames (video frames in pixel
space), H and W rows and columns, L text rows, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.clips import Interpolation
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import DEFAULT_SHIFT, ImageSettings, SolverName, check_sampling_settings
from megatron_flashi2v.data.transforms import to_model_range
from megatron_flashi2v.encoders.image_inputs import encode_image_inputs
from megatron_flashi2v.encoders.text_cleaning import POLICIES, CleaningPolicy
from megatron_flashi2v.sampling.denoise import Conditions, StepCallback, denoise
from megatron_flashi2v.sampling.experts import LowNoise, divided_by_noise, require_pair
from megatron_flashi2v.sampling.guidance import VelocityFunction, is_guided, with_guidance
from megatron_flashi2v.sampling.image import ImageLike, fit_image, pair_with_prompts
from megatron_flashi2v.sampling.noise import sample_extras, sample_noise
from megatron_flashi2v.sampling.prompts import DEFAULT_NEGATIVE_PROMPT, RowsOfText, encode_prompts
from megatron_flashi2v.sampling.solvers import make_solver

if TYPE_CHECKING:
    from megatron_flashi2v.encoders.image import ImageEncoder
    from megatron_flashi2v.encoders.video_vae import VideoVAE


@dataclass(frozen=True, kw_only=True)
class SampledVideo:
    """The result of one call of the pipeline.

    Attributes:
        frames_BTHWC: uint8 pixels of the videos; None with ``decode=False``.
        latents_BCTHW: fp32, normalised, on the host; the frames are decoded from them.
        images_BHWC: uint8, the condition images, resized and cropped; None without any.
    """

    frames_BTHWC: NDArray[np.uint8] | None
    latents_BCTHW: torch.Tensor
    images_BHWC: NDArray[np.uint8] | None

    def save(self, path: str | Path, fps: float, index: int = 0) -> None:
        """Write one of the videos as an mp4; its folder is made if it is not there.

        Raises:
            ConfigError: the frames were not decoded.
            UserError: the file cannot be written.
        """
        from megatron_flashi2v.sampling.video import write_mp4

        if self.frames_BTHWC is None:
            raise ConfigError("there are no frames to save: the pipeline was called with decode=False")
        write_mp4(Path(path), self.frames_BTHWC[index], fps)


class ImageToVideoPipeline:
    """Samples videos that start from an image and follow a prompt.

    Args:
        velocity: the model, see :data:`VelocityFunction`; called with fp32 tensors on ``device``, timesteps excepted.
        low_noise: a pair's second expert; ``velocity`` is the first then.
        interpolation: of images that are resized, as the training data were.
        negative_prompt: that of a call which gives none.
        vae: makes the image's latents and decodes the video's.
        text_encoder: makes the text rows; None where the caller brings them.
        image_encoder: makes the image's rows; None for a model that attends to none.
        model_config: the model's dimensions, its text length and how its captions were cleaned.
        device: of the velocity's tensors.
        batched_guidance: compute both guidance passes in one call at twice the batch.
        guidance_group: two ranks that compute one guidance pass each, see :func:`with_guidance`.

    Raises:
        ConfigError: the VAE or the text encoder is of another width than the model was trained with, or the model's
            text cleaning is unknown.
    """

    def __init__(
        self,
        *,
        velocity: VelocityFunction,
        vae: VideoVAE,
        text_encoder: RowsOfText | None,
        model_config: ModelConfig,
        device: torch.device,
        batched_guidance: bool = False,
        guidance_group: torch.distributed.ProcessGroup | None = None,
        image_encoder: ImageEncoder | None = None,
        low_noise: LowNoise | None = None,
        interpolation: Interpolation = "bicubic",
        negative_prompt: str = DEFAULT_NEGATIVE_PROMPT,
    ) -> None:
        if vae.latent_channels != model_config.latent_channels:
            raise ConfigError(
                f"the VAE's latents have {vae.latent_channels} channels, the model's latent_channels is "
                f"{model_config.latent_channels}; give the VAE that prepared the training data"
            )
        if text_encoder is not None and text_encoder.text_dim != model_config.text_dim:
            raise ConfigError(
                f"the text encoder's rows have width {text_encoder.text_dim}, the model's text_dim is "
                f"{model_config.text_dim}; give the text encoder that prepared the training data"
            )
        if model_config.text_cleaning not in POLICIES:
            raise ConfigError(
                f"the model's text_cleaning is {model_config.text_cleaning!r}; known are {', '.join(POLICIES)}"
            )
        self.paradigm = paradigm_of(model_config)
        rows = self.paradigm.image_rows(model_config)
        if rows and image_encoder is None:
            raise ConfigError(
                f"the model's conditioning is {model_config.conditioning!r}, which attends to the rows of an image "
                "encoder; give one (--image-encoder)"
            )
        if rows and image_encoder is not None and image_encoder.shape != (rows, model_config.image_dim):
            raise ConfigError(
                f"the image encoder makes {image_encoder.rows} rows of width {image_encoder.width}, the model takes "
                f"{rows} of {model_config.image_dim}; give the image encoder that the model was trained with"
            )
        self.image_encoder = image_encoder
        self.velocity, self.low_noise = velocity, low_noise
        self.interpolation, self.negative_prompt = interpolation, negative_prompt
        self.vae = vae
        self.text_encoder = text_encoder
        self.model_config = model_config
        self.text_cleaning = cast("CleaningPolicy", model_config.text_cleaning)
        self.device = device
        self.batched_guidance, self.guidance_group = batched_guidance, guidance_group

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        *,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        image_encoder: str | Path | None = None,
        device: str = "auto",
        **options: Any,
    ) -> AbstractContextManager[ImageToVideoPipeline]:
        """Load a checkpoint's model for sampling in this process; the pipeline can be called inside the context.

        Args:
            checkpoint: folder of ``train --save`` (its newest checkpoint), one of its ``iter_*``, or a release.
            vae: folder of the VAE that prepared the training data; None takes the release's.
            text_encoder: folder of the text encoder that prepared them, likewise.
            tokenizer: folder of its tokenizer, likewise.
            image_encoder: folder of the image encoder, for a model that attends to its rows.
            device: auto, cuda, npu or cpu.
            options: ``weights`` (model or ema), ``bf16``, ``attention_backend``, ``batched_guidance``; of adapters
                ``base`` and ``adapter_scale``; of a pair ``low_noise`` (a path), ``low_noise_base`` and
                ``boundary_ratio``. They are as the flags of ``flashi2v sample``.

        Raises:
            UserError: a folder is missing or damaged, or the parts do not fit together.
        """
        from megatron_flashi2v.sampling.opening import open_pipeline

        frozen = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "image_encoder": image_encoder}
        places: dict[str, Any] = {name: None if place is None else Path(place) for name, place in frozen.items()}
        return open_pipeline(Path(checkpoint), **places, device=device, **options)

    @torch.no_grad()
    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        prompts: str | Sequence[str],
        *,
        num_frames: int,
        height: int,
        width: int,
        negative_prompt: str | None = None,
        num_steps: int = 50,
        solver: SolverName = "euler",
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        shift: float = DEFAULT_SHIFT,
        cutoff_ratio: float = 0.1,
        image_noise: float = 0.02,
        seed: int = 0,
        first_index: int = 0,
        keys: Sequence[int | str] | None = None,
        noise_BCTHW: torch.Tensor | None = None,
        decode: bool = True,
        callback: StepCallback | None = None,
    ) -> SampledVideo:
        """Sample one video per (image, prompt) pair.

        Args:
            images: PIL images, uint8 tensors ``[3, H, W]`` of any size, or files of pictures or videos; one image
                serves all prompts. None only for a text-to-video model.
            prompts: one prompt serves all images.
            num_frames: video frames, ``1 + k * temporal stride`` of the VAE.
            height: pixels; the image is resized to cover height x width and cropped at its centre.
            width: pixels.
            negative_prompt: guidance steers away from it; None takes the pipeline's (the release's, or
                :data:`DEFAULT_NEGATIVE_PROMPT`), and the empty string is the empty prompt of training.
            num_steps: steps of the solver.
            solver: see :func:`~megatron_flashi2v.sampling.solvers.make_solver`.
            guidance_scale: classifier-free guidance, off at 1 and below.
            guidance_scale_2: that of a pair's second expert; None takes the same.
            shift: shift of the noise levels toward noise.
            cutoff_ratio: share of the image's spectrum, counted from the lowest frequencies, that the Fourier
                guidance leaves out, in [0, 1].
            image_noise: level of the noise on the image's latents, where the paradigm adds noise.
            seed: sample ``i`` of this call starts from noise keyed by (seed, first_index + i).
            first_index: place of the first sample in the user's whole list.
            keys: of the samples, in place of first_index and those after it, such as ids.
            noise_BCTHW: noise to start from, in place of the keyed one.
            decode: make frames of the latents; of the ranks that share a model, one is enough.
            callback: called after every step, see :data:`StepCallback`.

        Raises:
            ConfigError: a setting is out of range, or the size does not fit the VAE and the model.
        """
        check_sampling_settings(
            num_steps=num_steps, guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2, shift=shift
        )
        require_pair(guidance_scale_2, self.low_noise)
        settings = ImageSettings(cutoff_ratio=cutoff_ratio, image_noise=image_noise)
        solving = make_solver(solver, num_steps, shift, self.device)
        latent_shape = latent_shape_of(self.vae, self.model_config, num_frames, height, width)
        prompts, fitted_BCHW = self.prepare(images, prompts, height, width)
        count = len(prompts)
        keys = range(first_index, first_index + count) if keys is None else keys
        if noise_BCTHW is None:
            noise_BCTHW = sample_noise(seed, keys, latent_shape)
        conditions = Conditions(
            image_latents_BC1HW=self.encode_images(fitted_BCHW, count, latent_shape),
            text_BLD=self.encode_text(prompts),
            extras={
                **self.extras(settings, seed, keys, latent_shape),
                **self.image_inputs(fitted_BCHW, latent_shape),
            },
        )
        latents_BCTHW = denoise(
            self.guided(negative_prompt, guidance_scale, guidance_scale_2, count),
            noise_BCTHW.to(self.device),
            conditions,
            solving,
            callback=callback,
        )
        return SampledVideo(
            frames_BTHWC=to_frames(self.vae.decode(latents_BCTHW)) if decode else None,
            latents_BCTHW=latents_BCTHW.cpu(),
            images_BHWC=None if fitted_BCHW is None else fitted_BCHW.permute(0, 2, 3, 1).numpy(),
        )

    def prepare(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        prompts: str | Sequence[str],
        height: int,
        width: int,
    ) -> tuple[list[str], torch.Tensor | None]:
        """One prompt per sample, and the fitted images, uint8 ``[B, 3, H, W]`` (None without images)."""
        prompt_list = [prompts] if isinstance(prompts, str) else list(prompts)
        if images is not None:
            image_list = list(images) if isinstance(images, (list, tuple)) else [cast("ImageLike", images)]
            image_list, prompt_list = pair_with_prompts(image_list, prompt_list)
            return prompt_list, torch.stack(
                [fit_image(image, height, width, self.interpolation) for image in image_list]
            )
        if self.paradigm.uses_image:
            raise ConfigError(
                f"no image was given, but the model's conditioning is {self.model_config.conditioning!r}"
            )
        return prompt_list, None

    def encode_images(
        self, fitted_BCHW: torch.Tensor | None, count: int, latent_shape: tuple[int, int, int, int]
    ) -> torch.Tensor:
        """Normalised latents of the images as one-frame videos, fp32 ``[B, C, 1, H, W]`` (zeros without images).

        The VAE is causal, so that these are also the first latent frame of any video that starts with the image.
        """
        if fitted_BCHW is None:
            channels, _, height, width = latent_shape
            return torch.zeros((count, channels, 1, height, width), device=self.device)
        return self.vae.encode(self._pixels(fitted_BCHW)).to(self.device, torch.float32)

    def image_inputs(
        self, fitted_BCHW: torch.Tensor | None, latent_shape: tuple[int, int, int, int]
    ) -> dict[str, torch.Tensor]:
        """What the paradigm takes of the images beside their latents, by name, on the device."""
        names = self.paradigm.stored_inputs(self.model_config, latent_shape)
        if fitted_BCHW is None or not names:
            return {}
        frames = 1 + (latent_shape[1] - 1) * self.vae.temporal_stride
        found = encode_image_inputs(names, self._pixels(fitted_BCHW), frames, self.vae, self.image_encoder)
        return {name: rows.to(self.device) for name, rows in found.items()}

    def _pixels(self, fitted_BCHW: torch.Tensor) -> torch.Tensor:
        """Images as videos of one frame in [-1, 1], [B, 3, 1, H, W] on the device."""
        # The transform takes the first axis for time; here it counts images.
        return to_model_range(fitted_BCHW).transpose(0, 1).unsqueeze(2).to(self.device)

    def extras(
        self, settings: ImageSettings, seed: int, keys: Sequence[int | str], latent_shape: tuple[int, int, int, int]
    ) -> dict[str, torch.Tensor]:
        """:func:`~megatron_flashi2v.sampling.noise.sample_extras` of the model's paradigm, on the device."""
        extras = sample_extras(self.paradigm, settings, seed, keys, latent_shape)
        return {name: value.to(self.device) for name, value in extras.items()}

    def guided(
        self, negative_prompt: str | None, guidance_scale: float, guidance_scale_2: float | None, count: int
    ) -> VelocityFunction:
        """The velocity of so many samples, away from the negative prompt where a scale does not turn that off."""
        velocities, scales = [self.velocity], [guidance_scale]
        if self.low_noise is not None:
            velocities.append(self.low_noise.velocity)
            scales.append(guidance_scale if guidance_scale_2 is None else guidance_scale_2)
        if any(map(is_guided, scales)):
            negative = self.negative_prompt if negative_prompt is None else negative_prompt
            negative_BLD = self.encode_text([negative], "negative prompt").expand(count, -1, -1)
            velocities = [
                with_guidance(
                    velocity, negative_BLD, scale, batched=self.batched_guidance, group=self.guidance_group
                )
                for velocity, scale in zip(velocities, scales, strict=True)
            ]
        if self.low_noise is None:
            return velocities[0]
        high, low = velocities
        return divided_by_noise(high, low, self.low_noise.boundary_ratio)

    def encode_text(self, prompts: Sequence[str], what: str = "prompt") -> torch.Tensor:
        """Text rows ``[B, text length, D]``, cleaned as the captions in training were, with zeros after the last.

        The model has no text mask: it attends to the zero rows too, as in training.

        Raises:
            ConfigError: cleaning empties a prompt; ``what`` it is called.
        """
        assert self.text_encoder is not None, "the caller brings the rows"
        return encode_prompts(
            self.text_encoder, prompts, self.text_cleaning, self.model_config.text_length, what
        ).to(self.device)


def latent_shape_of(
    vae: VideoVAE, model_config: ModelConfig, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents of one video.

    Raises:
        ConfigError: the frames or a side do not fit the VAE's strides and the model's patches; the message names
            the nearest values that do.
    """
    patch_frames, patch_height, patch_width = model_config.patch_size
    _require_fit(
        "num_frames",
        num_frames,
        vae.temporal_stride * patch_frames,
        first=1 + (patch_frames - 1) * vae.temporal_stride,
        reason=f"the VAE's temporal stride {vae.temporal_stride}",
    )
    for name, pixels, patch in (("height", height, patch_height), ("width", width, patch_width)):
        _require_fit(
            name,
            pixels,
            vae.spatial_stride * patch,
            first=vae.spatial_stride * patch,
            reason=f"the VAE's spatial stride {vae.spatial_stride} x the model's patch {patch}",
        )
    return vae.latent_shape(num_frames, height, width)


def _require_fit(name: str, value: int, step: int, *, first: int, reason: str) -> None:
    """``value`` must be ``first + k * step``."""
    if value >= first and (value - first) % step == 0:
        return
    below = first + max(0, (value - first) // step) * step
    nearest = f"{below} or {below + step}" if value > first else str(first)
    rule = f"a multiple of {step}" if first == step else f"{first} plus a multiple of {step}"
    raise ConfigError(f"{name} is {value}; {reason} asks for {rule}, for instance {nearest}")


def to_frames(video_BCTHW: torch.Tensor) -> NDArray[np.uint8]:
    """Pixels in [-1, 1] as uint8 frames ``[B, T, H, W, C]``: clamped, scaled to [0, 255], rounded half up."""
    unit_BCTHW = (video_BCTHW.float().clamp(-1.0, 1.0) + 1.0) / 2.0
    return (unit_BCTHW * 255.0 + 0.5).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()
