"""Where a training step's time goes, by kind of work: launches, seconds, and the least that they could be."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import profile, supported_activities

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.evaluation.benchmark import device_events
from megatron_flashi2v.evaluation.communication import Communication, communication
from megatron_flashi2v.models.flops import BACKWARD, forward_flops
from megatron_flashi2v.models.patches import token_grid
from megatron_flashi2v.runtime.device import Device

REST = "sums, additions and the rest"
KINDS = {
    "attention": ("attention", "flash", "fmha"),
    "norms and residual sums": ("norm_forward", "norm_backward", "gate_forward", "gate_backward", "_AdaLayerNorm",
                                "_GateResidual", "_ResidualNorm"),
    "norms of queries and keys": ("turn_forward", "turn_backward", "_NormAndTurn"),
    "bias and GELU": ("gelu_forward", "gelu_backward", "_BiasGelu"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "conv", "gemm", "nvjet", "cutlass"),
    "optimizer and clipping": ("_foreach", "_fused_adam", "adam", "multi_tensor", "Optimizer.step"),
    "copies, casts and fills": ("aten::copy_", "Memcpy", "Memset", "aten::cat", "aten::fill_", "aten::zero_",
                                "copy_kernel", "FillFunctor", "CatArrayBatchedCopy"),
}  # fmt: skip
"""Kinds by parts of the names of kernels, operators and the autograd functions around them. The first that fits counts:
names of attention's kernels tell of products too."""
COLUMNS = ("part", "launches", "ms", "share", "floor_ms", "over_floor")


def profile_step(
    step: Callable[[], object], device: Device
) -> tuple[dict[str, tuple[int, float]], Communication]:
    """(launches, seconds) of one step by kind, and what it exchanges; on CPUs of operators without what they call."""
    with profile(activities=list(supported_activities())) as recorded:
        start = time.perf_counter()
        step()
        device.synchronize()
        step_s = time.perf_counter() - start
    parts: dict[str, tuple[int, float]] = {}
    for name, seconds, count in device_events(recorded, device):
        launches, total = parts.get(kind_of(name), (0, 0.0))
        parts[kind_of(name)] = launches + count, total + seconds
    return parts, communication(recorded, step_s)


def kind_of(name: str) -> str:
    """A kind of work by a kernel's name, or an operator's with the names of those that called it."""
    return next((kind for kind, known in KINDS.items() if any(part in name for part in known)), REST)


def floors(
    config: ModelConfig,
    latent_shape: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    parameters: int,
    *,
    flops_per_second: float,
    bytes_per_second: float,
) -> dict[str, float]:
    """The least seconds of each kind in a step without recomputation; what has no floor could be left out.

    Products and attention: the model's definition, with the scores that flash attention's backward computes again.
    Elementwise work: tensors that each operator reads and writes at least, whatever the number of kernels.
    AdamW: weights, gradient and both moments read in fp32, all but the gradient written, and the model's copy written;
    the gradient read once more for its norm.

    Args:
        config: dimensions.
        latent_shape: latent frames, rows and columns.
        batch: samples.
        dtype: of activations and the model's copy of the weights.
        parameters: numbers that the optimizer updates.
        flops_per_second: of a large matrix product here.
        bytes_per_second: read and written by a copy here.
    """
    flops = forward_flops(config, latent_shape, batch)
    attention = flops["self_attention"] + flops["cross_attention"]
    products = (sum(flops.values()) - attention) * (1 + BACKWARD)
    rows = batch * math.prod(token_grid(latent_shape, config.patch_size)) * config.num_layers
    texts = batch * config.text_length * config.num_layers
    width, itemsize = config.hidden_size, dtype.itemsize
    numbers = {
        # A norm reads and writes 1 + 1 tensors, and 2 + 1 in backward; a gated sum 2 + 1 and 2 + 1; a norm with the
        # gated sum before it 2 + 2 and 4 + 2, with a plain one 2 + 2 and 3 + 1, whose gradient is that of both terms.
        "norms and residual sums": (5 + 6 + 10 + 8) * rows * width,
        "norms of queries and keys": 5 * (3 * rows + texts) * width,
        "bias and GELU": 5 * rows * config.ffn_hidden_size,
    }
    model_copy = 0 if dtype == torch.float32 else itemsize
    return {
        "attention": attention * (1 + 2.5) / flops_per_second,
        "matrix products": products / flops_per_second,
        **{kind: count * itemsize / bytes_per_second for kind, count in numbers.items()},
        "optimizer and clipping": parameters * (8 * 4 + model_copy) / bytes_per_second,
    }


def part_rows(parts: Mapping[str, tuple[int, float]], least: Mapping[str, float]) -> list[dict[str, Any]]:
    """The table's rows, the longest first.

    Args:
        parts: from :func:`profile_step`.
        least: from :func:`floors`.
    """
    total = sum(seconds for _, seconds in parts.values()) or 1.0
    return [
        {
            "part": kind, "launches": launches, "ms": 1e3 * seconds, "share": seconds / total,
            "floor_ms": 1e3 * least[kind] if kind in least else None,
            "over_floor": seconds / least[kind] if kind in least else None,
        }
        for kind, (launches, seconds) in sorted(parts.items(), key=lambda item: -item[1][1])
    ]
