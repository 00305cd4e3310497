"""``FlashI2VPipeline``: an exported folder as a diffusers pipeline.

    from megatron_flashi2v import FlashI2VPipeline
    pipeline = FlashI2VPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
    frames = pipeline(image=image, prompt="...").frames[0]

The transformer is diffusers' own. The code of ``flashi2v sample`` makes noise, conditions and text, and runs the loop,
so that the same seed gives the same video.

Shape suffixes: B samples, C latent channels, T latent frames, H and W rows and columns, L text rows, D text width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from megatron_flashi2v.conditioning.interface import Extras
from megatron_flashi2v.config.clips import Interpolation
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings, check_sampling_settings
from megatron_flashi2v.encoders.image import ImageEncoder
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.text_cleaning import CleaningPolicy
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.release.call_inputs import check_inputs, second_scale, seeds_of, separate_images, spread_rows
from megatron_flashi2v.release.components import load_references
from megatron_flashi2v.release.image_conditioning import FlashI2VImageConditioning
from megatron_flashi2v.release.steps import NEGATIVE_ROWS, ROWS, CallState, StepEnd, Steps
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.experts import is_low_noise
from megatron_flashi2v.sampling.image import ImageLike
from megatron_flashi2v.sampling.noise import sample_noise
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline, latent_shape_of
from megatron_flashi2v.sampling.prompts import DEFAULT_NEGATIVE_PROMPT, encode_prompts
from megatron_flashi2v.sampling.solvers import SchedulerSolver, exact_euler

TEXT_ROWS = 512
"""Of which diffusers' transformer finds the text among the rows of an image."""


@dataclass
class FlashI2VPipelineOutput(BaseOutput):
    """The result of a call.

    Attributes:
        frames: [B, T, H, W, C] in [0, 1] (``output_type`` np), [B, T, C, H, W] (pt), lists of pictures (pil), or the
            latents [B, C, T, H, W] (latent).
    """

    frames: Any


class FlashI2VPipeline(CallState, DiffusionPipeline):
    """Image-to-video sampling with a model of any registered paradigm; text-to-video models take no image.

    Args:
        tokenizer: of the text encoder.
        text_encoder: UMT5EncoderModel.
        transformer: diffusers' transformer; of a pair of experts, the one for high noise.
        image_conditioning: the image's way into it.
        vae: AutoencoderKLWan.
        scheduler: any of diffusers' that predicts flow; it is the solver. A release's, first-order DPM-Solver++, is
            replaced by the flow-matching Euler scheduler, which takes the same steps without rounding timesteps.
        num_frames: default of a call, from the training data; so are the next two.
        height: pixels.
        width: pixels.
        fps: of the training data, for writing the frames to a file.
        image_encoder: CLIPVisionModel, for a model that attends to its rows; None for others.
        image_processor: of the image encoder.
        transformer_2: a pair's expert for low noise; None for one model.
        image_conditioning_2: the image's way into that; None where it is the first's.
        interpolation: bicubic or bilinear, of images that are resized; from the training data.
        negative_prompt: default of a call; None takes the one of ``flashi2v sample``.
        boundary_ratio: of a pair: ``transformer`` takes timesteps of at least 1000 times this, as in diffusers.
    """

    # diffusers' base class sets these; its own annotations do not say so.
    tokenizer: Any
    text_encoder: Any
    transformer: Any
    image_conditioning: Any
    vae: Any
    scheduler: Any
    image_encoder: Any
    image_processor: Any
    transformer_2: Any
    image_conditioning_2: Any
    config: Any

    model_cpu_offload_seq: Any = "text_encoder->image_encoder->transformer->transformer_2"
    _optional_components = ["image_encoder", "image_processor", "transformer_2", "image_conditioning_2"]
    # Small, and called by other methods than forward, the only one that offloading hooks.
    _exclude_from_cpu_offload = ["image_conditioning", "image_conditioning_2", "vae"]
    _callback_tensor_inputs = ["latents", ROWS, NEGATIVE_ROWS]

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        transformer: WanTransformer3DModel,
        image_conditioning: FlashI2VImageConditioning,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        num_frames: int = 49,
        height: int = 480,
        width: int = 832,
        fps: float = 16.0,
        image_encoder: Any = None,
        image_processor: Any = None,
        transformer_2: WanTransformer3DModel | None = None,
        image_conditioning_2: FlashI2VImageConditioning | None = None,
        boundary_ratio: float | None = None,
        interpolation: Interpolation = "bicubic",
        negative_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer,
            image_conditioning=image_conditioning, vae=vae, scheduler=exact_euler(scheduler),
            image_encoder=image_encoder, image_processor=image_processor,
            transformer_2=transformer_2, image_conditioning_2=image_conditioning_2,
        )  # fmt: skip
        self.register_to_config(
            num_frames=num_frames, height=height, width=width, fps=fps, boundary_ratio=boundary_ratio,
            interpolation=interpolation, negative_prompt=negative_prompt,
        )
        self.video_processor = VideoProcessor()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> FlashI2VPipeline:
        """As of any pipeline; components that the folder names elsewhere are loaded from there.

        Args:
            pretrained_model_name_or_path: an exported folder, or a Hub repository with one.
            options: as of ``DiffusionPipeline.from_pretrained``; ``vae=...`` and the like replace a component.
        """
        options = load_references(cls, pretrained_model_name_or_path, options)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_videos_per_prompt: int | None = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        cutoff_ratio: float = 0.1,
        image_noise: float = 0.02,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepEnd | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        guidance_scale_2: float | None = None,
    ) -> FlashI2VPipelineOutput | tuple[Any]:
        """Sample videos.

        Args:
            image: PIL images, arrays ``[H, W, 3]``, tensors ``[3, H, W]`` (uint8, or floating in [0, 1]; also in
                batches) or files; one serves all prompts. Cropped as in training.
            prompt: one serves all images; None is the empty prompt.
            negative_prompt: guidance steers away from it; None takes the release's, or the one of ``flashi2v
                sample``. A list gives each prompt its own.
            height: pixels; None takes the training data's, here and for the next two.
            width: pixels.
            num_frames: video frames.
            num_inference_steps: steps of the scheduler.
            guidance_scale: classifier-free guidance, off at 1 and below.
            num_videos_per_prompt: videos of each (image, prompt) pair.
            generator: its *seed* keys all noise, as ``--seed`` of ``flashi2v sample`` does, on any device and in any
                batch; its state is neither used nor changed. A list gives each video its own.
            latents: noise to start from, in place of the keyed one.
            prompt_embeds: text rows ``[B, L, D]`` in place of a prompt, such as :meth:`encode_prompt` makes. The
                model attends to all rows, zeros too: it was trained with its whole text length.
            negative_prompt_embeds: text rows in place of a negative prompt.
            cutoff_ratio: share of the image's spectrum, from the lowest frequencies, that the Fourier guidance leaves
                out.
            image_noise: level of the noise on the image's latents, where the paradigm adds noise.
            output_type: np, pt, pil or latent.
            return_dict: an output object, or a tuple.
            attention_kwargs: passed to the transformer.
            callback_on_step_end: called after every step with (pipeline, step, timestep, tensors); returned tensors
                replace those of the steps that follow.
            callback_on_step_end_tensor_inputs: names of those tensors: latents, prompt_embeds,
                negative_prompt_embeds.
            max_sequence_length: text rows of each prompt; None takes the model's text length.
            guidance_scale_2: guidance_scale of a pair's second expert; None takes the same.

        Raises:
            ConfigError: a setting is out of range, inputs exclude each other or do not fit the model, or the size
                does not fit the VAE and the model.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_inputs(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
                     callback_on_step_end_tensor_inputs)
        check_sampling_settings(
            num_steps=num_inference_steps, guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2, shift=1.0
        )
        settings = ImageSettings(cutoff_ratio=cutoff_ratio, image_noise=image_noise)
        sampler, device = self._sampler(), self._execution_device
        height, width = height or self.config.height, width or self.config.width
        shape = latent_shape_of(
            sampler.vae, sampler.model_config, num_frames or self.config.num_frames, height, width
        )
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._guidance_scale_2 = second_scale(self, guidance_scale, guidance_scale_2)
        self._interrupt = False
        repeats = num_videos_per_prompt or 1
        # Given rows have no prompts, but a place for each.
        places = [""] * len(prompt_embeds) if prompt_embeds is not None else prompt or ""
        places, fitted_BCHW = sampler.prepare(separate_images(image), places, height, width)
        if fitted_BCHW is not None:
            fitted_BCHW = fitted_BCHW.repeat_interleave(repeats, dim=0)
        rows = self.encode_prompt(
            places, negative_prompt, self.do_classifier_free_guidance, 1, prompt_embeds, negative_prompt_embeds,
            max_sequence_length, device,
        )  # fmt: skip
        text = {
            name: spread_rows(rows_BLD, len(places), repeats)
            for name, rows_BLD in zip((ROWS, NEGATIVE_ROWS), rows, strict=True) if rows_BLD is not None
        }  # fmt: skip
        count = len(places) * repeats
        seeds = seeds_of(generator, count)
        extras = [sampler.extras(settings, seed, [index], shape) for seed, index in seeds]
        conditions = Conditions(
            image_latents_BC1HW=sampler.encode_images(fitted_BCHW, count, shape),
            text_BLD=text[ROWS],
            extras={
                **{name: torch.cat([row[name] for row in extras]) for name in extras[0]},
                **sampler.image_inputs(fitted_BCHW, shape),
            },
        )
        if latents is None:
            latents = torch.cat([sample_noise(seed, [index], shape) for seed, index in seeds])
        elif latents.shape != (count, *shape):
            raise ConfigError(f"latents have the shape {list(latents.shape)}; it must be {[count, *shape]}")
        solver = SchedulerSolver(self.scheduler, num_inference_steps, device)
        self._num_timesteps = len(solver.timesteps)
        with self.progress_bar(total=self._num_timesteps) as bar:
            steps = Steps(
                self, solver, text, callback_on_step_end, callback_on_step_end_tensor_inputs, advance=bar.update
            )
            state_BCTHW = denoise(
                steps.velocity, latents.to(device), conditions, solver,
                callback=steps.after, stop=lambda: self._interrupt,
            )  # fmt: skip
        self._current_timestep = None
        frames = self._output(sampler.vae, state_BCTHW, output_type)
        self.maybe_free_model_hooks()
        return FlashI2VPipelineOutput(frames=frames) if return_dict else (frames,)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text rows of both guidance passes; needs the text encoder and the tokenizer alone.

        Args:
            prompt: None where rows are given.
            negative_prompt: None takes the one of ``flashi2v sample``.
            do_classifier_free_guidance: make rows of the second pass too.
            num_videos_per_prompt: times that each prompt's rows are repeated.
            prompt_embeds: given rows are returned as they are, here and in the next.
            negative_prompt_embeds: of the second pass.
            max_sequence_length: rows of each prompt, of which longer ones are cut off; None takes the model's.
            device: of the rows; None takes the pipeline's.
            dtype: of the rows; None takes the text encoder's.

        Returns:
            ``[B, L, D]``, and the same of the second pass, or None without one.
        """
        device = device or self._execution_device

        def rows_of(texts: str | Sequence[str]) -> Tensor:
            if self.text_encoder is None or self.tokenizer is None:
                raise ConfigError(
                    "the pipeline has no text encoder; give prompt_embeds and, where guidance_scale is above 1, "
                    "negative_prompt_embeds"
                )
            texts = [texts] if isinstance(texts, str) else list(texts)
            length = max_sequence_length or self._model_config.text_length
            encoder = TextEncoder(self.text_encoder, self.tokenizer, length, source="text_encoder")
            cleaning = cast("CleaningPolicy", self._model_config.text_cleaning)
            return encode_prompts(encoder, texts, cleaning, length).repeat_interleave(num_videos_per_prompt, dim=0)

        if prompt_embeds is None:
            prompt_embeds = rows_of(prompt or "")
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative = self.config.negative_prompt if negative_prompt is None else negative_prompt
            negative = DEFAULT_NEGATIVE_PROMPT if negative is None else negative
            negative_prompt_embeds = rows_of(negative)
        prompt_embeds = prompt_embeds.to(device, dtype)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
        return prompt_embeds, negative_prompt_embeds

    @property
    def _model_config(self) -> Any:
        """The model's; where text alone is encoded, without other components, the class with its defaults."""
        conditioning = self.image_conditioning
        return ModelConfig if conditioning is None else conditioning.model_config

    def _sampler(self) -> ImageToVideoPipeline:
        """The pipeline of ``flashi2v sample`` around this one's components, for its conditions."""
        if self.image_encoder is not None and self.image_processor is None:
            raise ConfigError("image_encoder is given without image_processor; give the one that came with it")
        return ImageToVideoPipeline(
            velocity=self.velocity,
            vae=VideoVAE(self.vae, source="vae"),
            text_encoder=None,
            interpolation=self.config.interpolation,
            model_config=self._model_config,
            device=self._execution_device,
            image_encoder=None if self.image_encoder is None else ImageEncoder(
                self.image_encoder, self.image_processor, source="image_encoder"
            ),
        )

    def velocity(
        self,
        latents_BCTHW: Tensor,
        timestep_B: Tensor,
        text_BLD: Tensor,
        image_latents_BC1HW: Tensor,
        extras: Extras,
    ) -> Tensor:
        """One call of the transformer that the timestep belongs to; fp32 outside, its own dtype inside."""
        transformer, conditioning, _ = self.expert(timestep_B[0])
        conditioned = conditioning(latents_BCTHW, image_latents_BC1HW, extras)
        dtype, rows_BRX = transformer.dtype, conditioned.image_rows_BRX
        if rows_BRX is not None and text_BLD.shape[1] != TEXT_ROWS:
            raise ConfigError(
                f"there are {text_BLD.shape[1]} text rows; beside an image's rows diffusers' transformer takes "
                f"{TEXT_ROWS} of them for granted: give max_sequence_length={TEXT_ROWS}"
            )
        with conditioning.guiding(transformer, conditioned.guidance_BCTHW):
            velocity_BCTHW = transformer(
                hidden_states=conditioned.latents_BCTHW.to(dtype),
                timestep=timestep_B.to(latents_BCTHW.device),
                encoder_hidden_states=text_BLD.to(dtype),
                encoder_hidden_states_image=None if rows_BRX is None else rows_BRX.to(dtype),
                attention_kwargs=self._attention_kwargs,
                return_dict=False,
            )[0]
        return velocity_BCTHW.float()

    def expert(self, timestep: Tensor) -> tuple[Any, Any, float]:
        """The transformer that a timestep belongs to, the image's way into it, and its guidance scale."""
        ratio = self.config.boundary_ratio
        if ratio is None or not is_low_noise(timestep, ratio):
            return self.transformer, self.image_conditioning, self.guidance_scale
        own = self.image_conditioning_2
        return self.transformer_2, self.image_conditioning if own is None else own, self.guidance_scale_2

    def _output(self, vae: VideoVAE, state_BCTHW: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return state_BCTHW
        return self.video_processor.postprocess_video(vae.decode(state_BCTHW), output_type=output_type)
