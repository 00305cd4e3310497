"""Videos a minute of our pipeline, beside diffusers' WanPipeline with the same weights, prompt and noise in one run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import DEFAULT_SHIFT
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.evaluation.bench_options import SamplingBenchmark
from megatron_flashi2v.evaluation.benchmark import interleaved_seconds, machine, median_ratio, table, write_json
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import Device, resolve_device
from megatron_flashi2v.sampling.load import velocity_of
from megatron_flashi2v.sampling.noise import sample_noise
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline, latent_shape_of

PROMPT, NEGATIVE = "A dog runs through the street.", ""


def run(options: SamplingBenchmark) -> str:
    """Measure, write the report if asked for, and return the table.

    Raises:
        ConfigError: an unknown preset, a folder that is missing or does not fit, or a device that is not there.
    """
    if options.model not in PRESETS:
        raise ConfigError(f"--model {options.model}: choose one of {', '.join(PRESETS)}")
    device = resolve_device(options.device)
    where, dtype = device.torch_device, torch.bfloat16 if options.bf16 else torch.float32
    vae = VideoVAE.load(options.vae, where)
    config = dataclasses.replace(PRESETS[options.model], conditioning="text_to_video")
    config = dataclasses.replace(config, num_layers=options.num_layers or config.num_layers)
    text = TextEncoder.load(options.text_encoder, options.tokenizer, config.text_length, where, dtype)
    config = dataclasses.replace(
        config, latent_channels=vae.latent_channels, text_dim=text.text_dim,
        text_cleaning="light",  # diffusers'
    )
    shape = latent_shape_of(vae, config, options.num_frames, options.height, options.width)
    noise_BCTHW = sample_noise(0, [0], shape)
    with single_process(device) as groups:
        model = build_model(config, groups, device, bf16=options.bf16, attention_backend=options.attention_backend)
        _fill(model)
        ours = _ours(options, model, vae, text, config, device, noise_BCTHW)
        theirs = _theirs(options, model, config, device, dtype, noise_BCTHW)
        expected = theirs().float().cpu()
        difference = (ours().latents_BCTHW - expected).abs().max().item()
        seconds = interleaved_seconds(
            {"megatron_flashi2v": lambda: ours(decode=True), "diffusers": lambda: theirs(decode=True)}, device,
            options.rounds,
        )
    rows = [
        {"pipeline": name, "seconds": statistics.median(values), "least_seconds": min(values),
         "videos_a_minute": 60 / statistics.median(values), "rounds": values}
        for name, values in seconds.items()
    ]  # fmt: skip
    report: dict[str, Any] = {
        "machine": machine(device), "options": {key: str(value) for key, value in vars(options).items()},
        "latent_shape": shape, "dtype": str(dtype), "rows": rows, "largest_difference_of_latents": difference,
        "largest_latent": expected.abs().max().item(),
        "throughput_over_peer": median_ratio(seconds["diffusers"], seconds["megatron_flashi2v"]),
        "least_over_peer": min(seconds["diffusers"]) / min(seconds["megatron_flashi2v"]),
    }
    if options.json is not None:
        write_json(options.json, report)
    return (
        f"{report['machine']}\n"
        f"latents {shape}, {dtype}, {options.num_steps} steps, guidance {options.guidance_scale:g}\n"
        f"{table(rows, ('pipeline', 'seconds', 'least_seconds', 'videos_a_minute'))}"
        f"\nlargest difference of the latents: {difference:.2g}; largest latent: {report['largest_latent']:.3g}\n"
        f"videos a minute over diffusers', median of rounds: {report['throughput_over_peer']:.3f}; of the least times: "
        f"{report['least_over_peer']:.3f}\n"
    )


def _ours(
    options: SamplingBenchmark, model: DiffusionTransformer, vae: VideoVAE, text: TextEncoder, config: ModelConfig,
    device: Device, noise_BCTHW: Tensor,
) -> Callable[..., Any]:  # fmt: skip
    pipeline = ImageToVideoPipeline(
        velocity=velocity_of(model.eval()), vae=vae, text_encoder=text, model_config=config, device=device.torch_device,
        batched_guidance=options.batched_guidance,
    )

    def video(decode: bool = False) -> Any:
        return pipeline(
            None, PROMPT, negative_prompt=NEGATIVE, num_frames=options.num_frames, height=options.height,
            width=options.width, num_steps=options.num_steps, guidance_scale=options.guidance_scale,
            shift=DEFAULT_SHIFT, noise_BCTHW=noise_BCTHW, decode=decode,
        )

    return video


def _theirs(
    options: SamplingBenchmark, model: DiffusionTransformer, config: ModelConfig, device: Device, dtype: torch.dtype,
    noise_BCTHW: Tensor,
) -> Callable[..., Any]:  # fmt: skip
    """diffusers' own pipeline with its own transformer, encoders and scheduler of flow matching."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    class EvenScheduler(FlowMatchEulerDiscreteScheduler):
        """Takes evenly spaced sigmas from 1, as FlashI2V's sampler does, before it shifts them."""

        def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **options: Any) -> None:
            even = torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist()
            cast("Any", super()).set_timesteps(sigmas=even, device=device, **options)

    pipeline: Any = WanPipeline(
        tokenizer=cast("Any", AutoTokenizer.from_pretrained(str(options.tokenizer), local_files_only=True)),
        text_encoder=UMT5EncoderModel.from_pretrained(
            str(options.text_encoder), local_files_only=True, dtype=dtype
        ),
        transformer=as_diffusers(model, config, dtype),
        vae=AutoencoderKLWan.from_pretrained(str(options.vae), local_files_only=True),
        scheduler=cast("Any", EvenScheduler(shift=DEFAULT_SHIFT)),
    )
    pipeline.to(device.torch_device)
    pipeline.set_progress_bar_config(disable=True)

    def video(decode: bool = False) -> Any:
        return pipeline(
            prompt=PROMPT, negative_prompt=NEGATIVE, num_frames=options.num_frames, height=options.height,
            width=options.width, num_inference_steps=options.num_steps, guidance_scale=options.guidance_scale,
            max_sequence_length=config.text_length, latents=noise_BCTHW.clone().to(device.torch_device),
            output_type="np" if decode else "latent",
        ).frames

    return video


@torch.no_grad()
def as_diffusers(model: DiffusionTransformer, config: ModelConfig, dtype: torch.dtype) -> Any:
    """diffusers' transformer with the weights of a text-to-video model, in this precision but for what it keeps fp32.

    Args:
        model: whole.
        config: its dimensions.
        dtype: of the matrix products' weights.
    """
    from diffusers import WanTransformer3DModel

    theirs: Any = WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.head_dim, in_channels=config.latent_channels, out_channels=config.latent_channels,
        text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_hidden_size,
        num_layers=config.num_layers, eps=config.norm_eps,
    )
    ours, parameters = dict(model.named_parameters()), dict(theirs.named_parameters())
    for mapped in mappings(config, "diffusers"):
        tensors = mapped.to_external(ours[mapped.ours].float().cpu())
        for name, tensor in zip(mapped.external, tensors, strict=True):
            parameters.pop(name).copy_(tensor)
    assert not parameters, f"weights that ours do not fill: {sorted(parameters)}"
    kept = tuple(theirs._keep_in_fp32_modules or ())
    for name, parameter in theirs.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    return theirs.eval()


@torch.no_grad()
def _fill(model: DiffusionTransformer) -> None:
    """Random weights that keep the latents' size: the released ones would have to be downloaded."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
