"""Forward and backward of one transformer block, beside diffusers' block of the same sizes in the same run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.evaluation.bench_options import BlockBenchmark
from megatron_flashi2v.evaluation.benchmark import interleaved_seconds, machine, median_ratio, table, write_json
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import Device, resolve_device

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def run(options: BlockBenchmark) -> str:
    """Measure, write the report if asked for, and return the table.

    Raises:
        ConfigError: an unknown preset, or a device that is not there.
    """
    if options.model not in PRESETS:
        raise ConfigError(f"--model {options.model}: choose one of {', '.join(PRESETS)}")
    device = resolve_device(options.device)
    rows = []
    with single_process(device) as groups:
        for name in options.dtypes:
            blocks = make_blocks(options, getattr(torch, name), groups, device)
            seconds = interleaved_seconds(blocks, device, options.rounds, CLOCKS[options.clock])
            ours, theirs = seconds["megatron_flashi2v"], seconds["diffusers"]
            rows.append({
                "dtype": name, "seconds": statistics.median(ours), "diffusers_s": statistics.median(theirs),
                "ratio": median_ratio(ours, theirs), "rounds": ours, "diffusers_rounds": theirs,
            })
    report = {"machine": machine(device), "model": options.model, "latent_shape": options.latent_shape,
              "clock": options.clock, "rows": rows}
    if options.json is not None:
        write_json(options.json, report)
    return f"{report['machine']}\n" + table(rows, ("dtype", "seconds", "diffusers_s", "ratio"))


def make_blocks(
    options: BlockBenchmark, dtype: torch.dtype, groups: Groups, device: Device
) -> dict[str, Callable[[], None]]:
    """Forward and backward of both blocks, with the same tokens, text and modulation.

    Each gets its weights' gradients as its trainers get them: ours in buffers that last and are zeroed, as
    megatron-core's data parallelism keeps them, diffusers' in new tensors, as ``zero_grad`` and autograd leave them.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    config = dataclasses.replace(PRESETS[options.model], num_layers=1, conditioning="text_to_video")
    spec = make_spec(config, groups, device.torch_device, bf16=dtype == torch.bfloat16,
                     attention_backend=options.attention_backend)
    width = config.hidden_size
    with device.torch_device:
        model = DiffusionTransformer(spec)
        theirs: nn.Module = WanTransformerBlock(
            width, config.ffn_hidden_size, config.num_attention_heads, "rms_norm_across_heads", True, config.norm_eps
        )
    ours = model.blocks["0"]
    for name, parameter in theirs.named_parameters():
        if not ("norm2" in name or "scale_shift" in name):  # what its pipelines keep in fp32
            parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        for parameter in [*ours.parameters(), *theirs.parameters()]:
            parameter.normal_(std=0.02)
    rotary = model.rotary(model.grid(options.latent_shape), device.torch_device)
    tokens = len(rotary.cos_SR)
    tables = tuple(part.repeat_interleave(2, dim=-1)[None, :, None] for part in (rotary.cos_SR, rotary.sin_SR))

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device.torch_device).to(to)

    hidden, text, gradient = draw(tokens, 1, width), draw(config.text_length, 1, width), draw(tokens, 1, width)
    modulation = draw(6, 1, width, to=torch.float32)

    buffers = [_give_gradient_buffer(parameter) for parameter in ours.parameters() if parameter.dim() == 2]

    def our_step() -> None:
        torch._foreach_zero_(buffers)
        inputs = [part.clone().requires_grad_() for part in (hidden, text, modulation)]
        ours(*inputs, rotary).backward(gradient)
        ours.zero_grad()

    def their_step() -> None:
        inputs = [part.transpose(0, 1).clone().requires_grad_() for part in (hidden, text, modulation)]
        theirs(*inputs, tables).backward(gradient.transpose(0, 1))
        theirs.zero_grad()

    return {"megatron_flashi2v": our_step, "diffusers": their_step}


def _give_gradient_buffer(weight: nn.Parameter) -> Tensor:
    """What megatron-core's data parallelism plants: an fp32 gradient that a linear's backward adds to."""
    buffer = torch.zeros_like(weight, dtype=torch.float32)
    weight.main_grad, weight.grad_added_to_main_grad = buffer, False  # type: ignore[attr-defined]
    return buffer
