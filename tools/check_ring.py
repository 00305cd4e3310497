"""Compare a ring's attention in bf16 with the whole one in fp64: this rank's outputs and gradients.

Start one process a rank, as torchrun does. A loss would not tell: an untrained model hardly attends.
"""

from __future__ import annotations

import argparse
import os
import sys

ROWS, BATCH, HEADS, HEAD_SIZE = 384, 2, 2, 128
LIMIT = 3e-2
"""Of the largest magnitude. The gradients of queries and keys are small differences: 1.2e-2 on a CPU."""


def largest_error(device_name: str, backend: str) -> float:
    """Of output and gradients, over the largest magnitude of each; the last row of the last rank is padding."""
    import torch

    from flashi2v_kernels.attention import BLOCK_BACKWARD, LOG_SUM_EXP, reference
    from flashi2v_kernels.registry import resolve
    from megatron_flashi2v.config.train import ParallelArguments
    from megatron_flashi2v.parallel.ring import Ring, ring_attention
    from megatron_flashi2v.parallel.world import world
    from megatron_flashi2v.runtime.device import resolve_device
    from megatron_flashi2v.runtime.launch import detect_launch

    launch = detect_launch(os.environ)
    device = resolve_device(device_name, launch.local_rank, backend="gloo")
    kernel = resolve("attention", device.name, torch.bfloat16, backend, head_dim=HEAD_SIZE,
                     features=(LOG_SUM_EXP, BLOCK_BACKWARD), needs_gradient=True)
    assert kernel.backward is not None  # a feature that was asked for
    tokens, ranks = ROWS * launch.world_size - 1, launch.world_size
    drawn = torch.randn(4, tokens + 1, BATCH, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    *inputs, gradient = drawn.to(device.torch_device)
    parallel = ParallelArguments(context_parallel_size=ranks, context_parallel_algo="ring", distributed_backend="gloo")
    with world(device, launch, parallel) as groups:
        assert groups.ring is not None
        ring = Ring(kernel.function, kernel.backward, groups.ring, tokens)
        leaves = [tensor.chunk(ranks)[launch.rank].detach().requires_grad_() for tensor in inputs]
        output = ring_attention(*leaves, ring)
        found = [output, *torch.autograd.grad(output, leaves, gradient.chunk(ranks)[launch.rank])]
    whole = [tensor[:tokens].double().transpose(0, 1).detach().requires_grad_() for tensor in inputs]
    expected = reference.attention(*whole)
    wanted = [expected, *torch.autograd.grad(expected, whole, gradient[:tokens].double().transpose(0, 1))]
    errors = []
    for ours, theirs in zip(found, wanted, strict=True):
        own = theirs.transpose(0, 1)[launch.rank * ROWS :][:ROWS]
        errors.append(((ours[: len(own)] - own).abs().max() / theirs.abs().max()).item())
    return max(errors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    options = parser.parse_args()
    error = largest_error(options.device, options.attention_backend)
    if not error <= LIMIT:
        sys.exit(f"the ring's attention differs by {error:.2g} where {LIMIT:g} is allowed")
    sys.stdout.write(f"{error:.1g} (allowed: {LIMIT:g})\n")
