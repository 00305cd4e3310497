"""A training step of one process, with the model-defined FLOP count, beside diffusers' model if asked for."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import profile, supported_activities

from flashi2v_kernels.registry import describe
from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import OptimizerArguments, ParallelArguments, RecomputeArguments
from megatron_flashi2v.evaluation.benchmark import (
    device_events,
    interleaved_seconds,
    machine,
    matmul_ceiling,
    median_ratio,
    table,
    write_json,
)
from megatron_flashi2v.flow.interpolation import interpolate, velocity_target
from megatron_flashi2v.flow.sigmas import timesteps_of
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.models.build import build_stages
from megatron_flashi2v.models.flops import forward_flops, training_flops
from megatron_flashi2v.models.patches import token_grid
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.models.spec import ModelSpec, make_spec
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import Device, resolve_device
from megatron_flashi2v.runtime.host_reads import HostReads
from megatron_flashi2v.runtime.peaks import peak_tflops
from megatron_flashi2v.training.batch import Microbatch
from megatron_flashi2v.training.clipping import make_clipper
from megatron_flashi2v.training.optimizer import make_optimizer, wrap_data_parallel
from megatron_flashi2v.training.step import TrainingStep, forward_step

COLUMNS = ("implementation", "seconds", "tflops", "mfu", "of_matmul", "peak_gib", "forward_s", "backward_s",
           "optimizer_s")
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "conv", "gemm", "nvjet", "cutlass"),
    "attention": ("attention", "flash", "fmha"),
    "optimizer and clipping": ("_foreach", "_fused_adam", "adam", "multi_tensor"),
    "copies and casts": ("aten::copy_", "Memcpy", "aten::cat"),
}


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """Settings of a measurement.

    Attributes:
        model: preset.
        num_layers: blocks, where the preset's do not fit.
        conditioning: image-to-video paradigm; the peer has text_to_video.
        latent_shape: latent frames, rows and columns; 13 60 104 is 49 frames of 480x832 pixels.
        micro_batch_size: samples in the step.
        bf16: matrix products in bf16 with fp32 master weights; the peer holds its weights in bf16 alone.
        recompute: what is computed again in backward, as in training; the peer can do all blocks or none.
        attention_backend: implementation, or auto.
        device: auto, cuda, npu or cpu.
        rounds: measured steps.
        elementwise_backend: implementation of norms, modulation and activation, or auto.
        peer: diffusers' model with torch's AdamW, in the same run, step by step in turn; compiled block by block if
            asked for, as its users do to make it faster.
        profile: also break one step down by kinds of operators.
        json: file for the report.
    """

    model: str = "1.3b"
    num_layers: int | None = None
    conditioning: str = "flashi2v"
    latent_shape: tuple[int, int, int] = (13, 60, 104)
    micro_batch_size: int = 1
    bf16: bool = True
    recompute: RecomputeArguments = RecomputeArguments()
    attention_backend: str = "auto"
    elementwise_backend: str = "auto"
    device: str = "auto"
    rounds: int = 5
    peer: Literal["none", "diffusers", "diffusers-compiled"] = "none"
    profile: bool = True
    json: Path | None = None


def run(options: StepBenchmark) -> str:
    """Measure, write the report if asked for, and return the tables.

    Raises:
        ConfigError: an unknown preset, or a device or implementation that is not there.
    """
    if options.model not in PRESETS:
        raise ConfigError(f"--model {options.model}: choose one of {', '.join(PRESETS)}")
    config = dataclasses.replace(PRESETS[options.model], conditioning=options.conditioning)
    config = dataclasses.replace(config, num_layers=options.num_layers or config.num_layers)
    device = resolve_device(options.device)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    ceiling = matmul_ceiling(device, dtype) / 1e12
    with single_process(device) as groups:
        ours = OurStep(options, config, groups, device)
        steps: dict[str, Callable[[], object]] = {"megatron_flashi2v": ours}
        configs = {"megatron_flashi2v": config}
        if options.peer != "none":
            configs[options.peer] = dataclasses.replace(config, conditioning="text_to_video")
            steps[options.peer] = PeerStep(
                configs[options.peer], ours.batch, dtype, device, options.recompute,
                compiled=options.peer == "diffusers-compiled",
            )
        peaks = {name: _peak(step, device) for name, step in steps.items()}
        seconds = interleaved_seconds(steps, device, options.rounds)
        breakdown = ours.breakdown(device, options.rounds)
        kinds = profile_kinds(ours, device) if options.profile else {}
        kernels = describe(ours.spec.kernels.chosen)
    rows = []
    for name, values in seconds.items():
        flops = training_flops(configs[name], options.latent_shape, options.micro_batch_size)
        tflops = flops / statistics.median(values) / 1e12
        peak = peak_tflops(device, dtype)
        rows.append({
            "implementation": name, "seconds": statistics.median(values), "tflops": tflops,
            "mfu": tflops / peak if peak else None, "of_matmul": tflops / ceiling, "peak_gib": peaks[name] / 2**30,
            "flops": flops, "rounds": values, **(breakdown if name == "megatron_flashi2v" else {}),
        })
    report: dict[str, Any] = {
        "machine": machine(device), "model": config.to_json(), "latent_shape": options.latent_shape,
        "tokens": math.prod(token_grid(options.latent_shape, config.patch_size)), "dtype": str(dtype),
        "micro_batch_size": options.micro_batch_size, "recompute": dataclasses.asdict(options.recompute),
        "matmul_ceiling_tflops": ceiling, "peak_tflops": peak_tflops(device, dtype), "rows": rows,
        "forward_flops": forward_flops(config, options.latent_shape, options.micro_batch_size),
        "kinds": kinds, "kernels": kernels,
    }
    if options.peer in seconds:
        report["ratio_to_peer"] = median_ratio(seconds["megatron_flashi2v"], seconds[options.peer])
    if options.json is not None:
        write_json(options.json, report)
    return _text(report)


def host_reads(options: StepBenchmark) -> int:
    """How often the host reads the device in our step: once, for the loss, the norm and all counts together.

    Raises:
        RuntimeError: where a second read happens.
    """
    device = resolve_device(options.device)
    config = dataclasses.replace(PRESETS[options.model], conditioning=options.conditioning)
    with single_process(device) as groups:
        step = OurStep(options, config, groups, device)
        step()  # what is made once: the optimizer's state, compiled kernels
        with HostReads(device, allowed=1) as reads:
            step()
    return reads.count


class OurStep:
    """The trainer's step on one random microbatch.

    Args:
        options: sizes and precision.
        config: the model.
        groups: groups of one.
        device: where it runs.
    """

    def __init__(self, options: StepBenchmark, config: ModelConfig, groups: Groups, device: Device) -> None:
        self.options = options
        parallel, optimizer = ParallelArguments(), OptimizerArguments(lr=1e-5)
        self.spec = make_spec(
            config, groups, device.torch_device, bf16=options.bf16, attention_backend=options.attention_backend,
            elementwise_backend=options.elementwise_backend,
        )
        stages = build_stages(self.spec, parallel, options.recompute)
        for stage in stages:
            _fill(stage)
        models = wrap_data_parallel(stages, parallel)
        for model in models:
            model.train()
        self.step = TrainingStep(
            self.spec, stages, models, make_optimizer(models, optimizer, parallel, self.spec), make_clipper(optimizer),
            num_microbatches=1, micro_batch_size=options.micro_batch_size,
        )
        self.batch = random_batch(self.spec, options.latent_shape, options.micro_batch_size)

    def __call__(self) -> None:
        """Forward, backward and update."""
        self.losses_and_gradients()
        self.update()

    def update(self) -> None:
        """Clip and apply the gradients."""
        self.step.apply(self.step.agree(self.report).grad_norm)

    def losses_and_gradients(self) -> None:
        """Forward and backward."""
        self.report = self.step.losses_and_gradients([itertools.repeat(self.batch)], self.options.latent_shape)

    @torch.no_grad()
    def forward(self) -> None:
        """Forward without what backward needs."""
        output, loss = forward_step(self.spec, itertools.repeat(self.batch), self.step.models[0])
        loss(output)

    def breakdown(self, device: Device, rounds: int) -> dict[str, float]:
        """Median seconds of the step's parts; backward is what forward leaves of both, with recomputation."""
        parts: dict[str, Callable[[], object]] = {
            "forward": self.forward, "both": self.losses_and_gradients, "optimizer": self.update,
        }
        seconds = interleaved_seconds(parts, device, rounds)
        forward, both, optimizer = (statistics.median(seconds[name]) for name in parts)
        return {"forward_s": forward, "backward_s": both - forward, "optimizer_s": optimizer}


class PeerStep:
    """The same sizes in diffusers' WanTransformer3DModel: text to video, torch's AdamW, clipping to 1.

    Args:
        config: the model, without image conditioning.
        batch: the same latents, noise, sigmas and text.
        dtype: of the weights, but for what diffusers keeps in fp32.
        device: where it runs.
        recompute: all blocks are recomputed if ours recompute anything.
        compiled: whether torch compiles its blocks, all by one compilation.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: Microbatch,
        dtype: torch.dtype,
        device: Device,
        recompute: RecomputeArguments,
        *,
        compiled: bool = False,
    ) -> None:
        from diffusers import WanTransformer3DModel

        self.model: Any  # diffusers' annotations hide that it is a module
        with device.torch_device:
            self.model = WanTransformer3DModel(
                patch_size=config.patch_size, num_attention_heads=config.num_attention_heads,
                attention_head_dim=config.head_dim, in_channels=config.latent_channels,
                out_channels=config.latent_channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
                ffn_dim=config.ffn_hidden_size, num_layers=config.num_layers,
            )
        kept = tuple(self.model._keep_in_fp32_modules or ())
        for name, parameter in self.model.named_parameters():
            if not any(part in name for part in kept):
                parameter.data = parameter.data.to(dtype)
        _fill(self.model)
        if recompute.recompute_granularity is not None:
            self.model.enable_gradient_checkpointing()
        self.model.train()
        if compiled:
            self.model.compile_repeated_blocks(fullgraph=True)
        self.dtype, self.batch = dtype, batch
        fused = device.name != "cpu"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.01, fused=fused or None)

    def __call__(self) -> None:
        """Forward, backward and update."""
        batch = self.batch
        noisy = interpolate(batch.latents_BCTHW, batch.noise_BCTHW, batch.sigma_B).to(self.dtype)
        velocity = self.model(
            noisy, timesteps_of(batch.sigma_B), batch.text_BLX.to(self.dtype), return_dict=False
        )[0]
        target = velocity_target(batch.latents_BCTHW, batch.noise_BCTHW)
        (velocity.float() - target).square().mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Small random weights: zeros would make some products trivial, and drawing them keyed takes minutes."""
    for parameter in model.parameters():
        parameter.normal_(std=0.02)


def random_batch(spec: ModelSpec, latent_shape: tuple[int, int, int], samples: int) -> Microbatch:
    """Normal latents, noise and text on the model's device."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=spec.device)

    config = spec.config
    image = (samples, config.latent_channels, 1, *latent_shape[1:])
    sigma_B = torch.full((samples,), 0.5)
    stored = paradigm_of(config).stored_inputs(config, (config.latent_channels, *latent_shape))
    return Microbatch(
        latents_BCTHW=normal(samples, config.latent_channels, *latent_shape),
        noise_BCTHW=normal(samples, config.latent_channels, *latent_shape),
        sigma_B=sigma_B.to(spec.device),
        sinusoid_BF=timestep_sinusoid(timesteps_of(sigma_B), config.freq_dim).to(spec.device),
        text_BLX=normal(samples, config.text_length, config.text_dim).to(torch.bfloat16),
        extras={
            "cutoff_ratio": torch.full((samples,), 0.1, device=spec.device),
            "image_noise_level": torch.full((samples,), 0.05, device=spec.device),
            "image_noise": normal(*image),
            **{name: normal(samples, *shape) for name, shape in stored.items()},
        },
    )


def _peak(step: Callable[[], object], device: Device) -> int:
    """Bytes held at most during a step, optimizer state included; on the CPU since the process began."""
    step()  # the optimizer makes its state here
    device.reset_max_memory_allocated()
    step()
    device.synchronize()
    return device.max_memory_allocated()


def profile_kinds(step: Callable[[], object], device: Device) -> dict[str, float]:
    """Share of one step's time by kind of operator, each operator counted without what it calls."""
    activities = list(supported_activities())  # the CPU, and an accelerator if there is one
    with profile(activities=activities) as recorded:
        step()
        device.synchronize()
    shares: dict[str, float] = {}
    for name, seconds, _ in device_events(recorded, device):
        shares[kind_of(name)] = shares.get(kind_of(name), 0.0) + seconds
    total = sum(shares.values()) or 1.0
    return {kind: time / total for kind, time in sorted(shares.items(), key=lambda item: -item[1])}


def kind_of(operator: str) -> str:
    """A kind of work by an operator's or a kernel's name."""
    for kind in ("attention", *KINDS):  # attention first: its kernels' names tell of products, too
        if any(part in operator for part in KINDS[kind]):
            return kind
    return "elementwise, norms and the rest"


def _text(report: Mapping[str, Any]) -> str:
    layers = report["model"]["num_layers"]
    lines = [
        f"{report['machine']}\n{report['tokens']} tokens, {report['dtype']}, {layers} layers; "
        f"measured matrix product {report['matmul_ceiling_tflops']:.4g} TFLOP/s\n",
        table(report["rows"], COLUMNS),
    ]
    if "ratio_to_peer" in report:
        lines.append(f"\ntime over the peer's, median of rounds: {report['ratio_to_peer']:.3f}\n")
    if report["kinds"]:
        lines.append("\n" + table([{"kind": k, "share": v} for k, v in report["kinds"].items()], ("kind", "share")))
    rows = [dict(zip(("operator", "implementation", "why_not"), row, strict=True)) for row in report["kernels"]]
    lines.append("\n" + table(rows, ("operator", "implementation", "why_not")))
    return "".join(lines)
