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
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from megatron_flashi2v.conditioning.interface import Extras
from megatron_flashi2v.config.sample import ImageSettings, check_sampling_settings
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.release.components import load_references
from megatron_flashi2v.release.image_conditioning import FlashI2VImageConditioning
from megatron_flashi2v.sampling.denoise import Conditions, denoise
from megatron_flashi2v.sampling.image import ImageLike
from megatron_flashi2v.sampling.noise import sample_noise
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline, latent_shape_of
from megatron_flashi2v.sampling.solvers import SchedulerSolver

Seeds = list[tuple[int, int]]
"""The seed and the index that key each video's noise."""


@dataclass
class FlashI2VPipelineOutput(BaseOutput):
    """The result of a call.

    Attributes:
        frames: [B, T, H, W, C] in [0, 1] (``output_type`` np), [B, T, C, H, W] (pt), lists of pictures (pil), or the
            latents [B, C, T, H, W] (latent).
    """

    frames: Any


class FlashI2VPipeline(DiffusionPipeline):
    """Image-to-video sampling with a model of any registered paradigm; text-to-video models take no image.

    Args:
        tokenizer: of the text encoder.
        text_encoder: UMT5EncoderModel.
        transformer: diffusers' transformer.
        image_conditioning: the image's way into it.
        vae: AutoencoderKLWan.
        scheduler: FlowMatchEulerDiscreteScheduler; its ``shift`` is the sampler's.
        num_frames: default of a call, from the training data; so are the next two.
        height: pixels.
        width: pixels.
        fps: of the training data, for writing the frames to a file.
    """

    # diffusers' base class sets these; its own annotations do not say so.
    tokenizer: Any
    text_encoder: Any
    transformer: Any
    image_conditioning: Any
    vae: Any
    scheduler: Any
    config: Any

    model_cpu_offload_seq: Any = "text_encoder->transformer"
    # Small, and called by other methods than forward, the only one that offloading hooks.
    _exclude_from_cpu_offload = ["image_conditioning", "vae"]
    _callback_tensor_inputs = ["latents"]

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
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer,
            image_conditioning=image_conditioning, vae=vae, scheduler=scheduler,
        )  # fmt: skip
        self.register_to_config(num_frames=num_frames, height=height, width=width, fps=fps)
        self.video_processor = VideoProcessor()
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> FlashI2VPipeline:
        """As of any pipeline; components that the folder names elsewhere are loaded from there.

        Args:
            pretrained_model_name_or_path: an exported folder, or a Hub repository with one.
            options: as of ``DiffusionPipeline.from_pretrained``; ``vae=...`` and the like replace a component.
        """
        options = load_references(cls, pretrained_model_name_or_path, options)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set ``pipeline._interrupt`` to leave the loop."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike] | None = None,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        cutoff_ratio: float = 0.1,
        image_noise: float = 0.02,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> FlashI2VPipelineOutput | tuple[Any]:
        """Sample videos.

        Args:
            image: PIL images or uint8 tensors ``[3, H, W]``; one serves all prompts. Cropped as in training.
            prompt: one serves all images.
            negative_prompt: guidance steers away from it; None takes the one of ``flashi2v sample``.
            height: pixels; None takes the training data's, here and for the next two.
            width: pixels.
            num_frames: video frames.
            num_inference_steps: steps of the scheduler.
            guidance_scale: classifier-free guidance, off at 1 and below.
            num_videos_per_prompt: videos of each (image, prompt) pair.
            generator: its *seed* keys all noise, as ``--seed`` of ``flashi2v sample`` does, on any device and in any
                batch; its state is neither used nor changed. A list gives each video its own.
            latents: noise to start from, in place of the keyed one.
            cutoff_ratio: share of the image's spectrum, from the lowest frequencies, that the Fourier guidance leaves
                out.
            image_noise: level of the noise on the image's latents, where the paradigm adds noise.
            output_type: np, pt, pil or latent.
            return_dict: an output object, or a tuple.
            callback_on_step_end: called after every step with (pipeline, step, timestep, tensors); returned
                ``latents`` replace the state.
            callback_on_step_end_tensor_inputs: names of those tensors; only ``latents`` can be asked for.

        Raises:
            ConfigError: a setting is out of range, or the size does not fit the VAE and the model.
        """
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; there is only 'latents'")
        check_sampling_settings(num_steps=num_inference_steps, guidance_scale=guidance_scale, shift=1.0)
        settings = ImageSettings(cutoff_ratio=cutoff_ratio, image_noise=image_noise)
        sampler, device = self._sampler(), self._execution_device
        height, width = height or self.config.height, width or self.config.width
        shape = latent_shape_of(
            sampler.vae, sampler.model_config, num_frames or self.config.num_frames, height, width
        )
        prompts, fitted_BCHW = sampler.prepare(image, prompt, height, width)
        prompts = [text for text in prompts for _ in range(num_videos_per_prompt)]
        if fitted_BCHW is not None:
            fitted_BCHW = fitted_BCHW.repeat_interleave(num_videos_per_prompt, dim=0)
        seeds = _seeds(generator, len(prompts))
        rows = [sampler.extras(settings, seed, [index], shape) for seed, index in seeds]
        conditions = Conditions(
            image_latents_BC1HW=sampler.encode_images(fitted_BCHW, len(prompts), shape),
            text_BLD=sampler.encode_text(prompts),
            extras={name: torch.cat([row[name] for row in rows]) for name in rows[0]},
        )
        guidance = sampler.guidance(negative_prompt, guidance_scale, len(prompts))
        if latents is None:
            latents = torch.cat([sample_noise(seed, [index], shape) for seed, index in seeds])
        solver = SchedulerSolver(self.scheduler, num_inference_steps, device)

        self._interrupt = False
        with self.progress_bar(total=len(solver.timesteps)) as bar:

            def after_step(done: int, steps: int, state_BCTHW: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {"latents": state_BCTHW} if callback_on_step_end_tensor_inputs else {}
                returned = callback_on_step_end(self, done - 1, solver.timesteps[done - 1], tensors) or {}
                return returned.get("latents")

            state_BCTHW = denoise(
                self._velocity, latents.to(device), conditions, solver,
                guidance=guidance, callback=after_step, stop=lambda: self._interrupt,
            )  # fmt: skip
        frames = self._output(sampler.vae, state_BCTHW, output_type)
        self.maybe_free_model_hooks()
        return FlashI2VPipelineOutput(frames=frames) if return_dict else (frames,)

    def _sampler(self) -> ImageToVideoPipeline:
        """The pipeline of ``flashi2v sample`` around this one's components, for its conditions and text."""
        config = self.image_conditioning.model_config
        return ImageToVideoPipeline(
            velocity=self._velocity,
            vae=VideoVAE(self.vae, source="vae"),
            text_encoder=TextEncoder(self.text_encoder, self.tokenizer, config.text_length, source="text_encoder"),
            model_config=config,
            device=self._execution_device,
        )

    def _velocity(
        self,
        latents_BCTHW: Tensor,
        timestep_B: Tensor,
        text_BLD: Tensor,
        image_latents_BC1HW: Tensor,
        extras: Extras,
    ) -> Tensor:
        """One call of the transformer; fp32 outside, its own dtype inside."""
        conditioned = self.image_conditioning(latents_BCTHW, image_latents_BC1HW, extras)
        dtype = self.transformer.dtype
        with self.image_conditioning.guiding(self.transformer, conditioned.guidance_BCTHW):
            velocity_BCTHW = self.transformer(
                hidden_states=conditioned.latents_BCTHW.to(dtype),
                timestep=timestep_B.to(latents_BCTHW.device),
                encoder_hidden_states=text_BLD.to(dtype),
                return_dict=False,
            )[0]
        return velocity_BCTHW.float()

    def _output(self, vae: VideoVAE, state_BCTHW: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return state_BCTHW
        return self.video_processor.postprocess_video(vae.decode(state_BCTHW), output_type=output_type)


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Seeds:
    """A single generator keys by its seed and the video's place, a list by each one's seed."""
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} videos; give one for each, or one for all")
        return [(single.initial_seed(), 0) for single in generator]
    seed = secrets.randbits(63) if generator is None else generator.initial_seed()
    return [(seed, index) for index in range(count)]
