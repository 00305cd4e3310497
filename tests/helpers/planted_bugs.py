"""Wrong gradient rules, one at a time, for a test that the parity harness notices each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from helpers.planted_faults import is_last_rank, planted
from megatron_flashi2v.models import placement
from megatron_flashi2v.parallel import packing, ring
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.watching.observer import Observer


def norm_weights() -> Any:
    """Each rank keeps the gradient of its own tokens alone for the affine norm's weight and bias."""
    return unmarked("blocks.{i}.norm_cross.weight", "blocks.{i}.norm_cross.bias")


def modulation() -> Any:
    """The same for the blocks' modulation tables."""
    return unmarked("blocks.{i}.modulation")


def unmarked(*names: str) -> Any:
    """The names are declared as if every rank's gradient covered all tokens."""
    return mock.patch.dict(placement.PLACEMENTS, {name: placement.Placement() for name in names})


def text_rows() -> Any:
    """The gradient of the text rows is lost between two pipeline stages."""
    whole = packing._Unpack.backward

    def backward(ctx: Any, grad_tokens: Any, grad_text: Any, grad_rows: Any) -> Any:
        return whole(ctx, grad_tokens, torch.zeros_like(grad_text), grad_rows)

    return mock.patch.object(packing._Unpack, "backward", staticmethod(backward))


def noise_keys() -> Any:
    """Every replica draws the noise of the first one."""
    keyed = MicrobatchSource._generator

    def generator(self: MicrobatchSource, purpose: str, position: int) -> torch.Generator:
        return keyed(self, purpose, position - self.dp_rank * self.batch.micro_batch_size)

    return mock.patch.object(MicrobatchSource, "_generator", generator)


def ring_merge() -> Any:
    """Blocks of a ring are averaged as if each held as much of the softmax."""

    def merge(merged: Any, output: torch.Tensor, log_sum_exp: torch.Tensor) -> Any:
        if merged is None:
            return output, log_sum_exp
        return (merged[0] + output) / 2, torch.logaddexp(merged[1], log_sum_exp)

    return mock.patch.object(ring, "_merge", merge)


class StrayCopy(Observer):
    """The last rank alone scales the gradient of the latent shift's last layer; its copy is not the one saved."""

    def gradients_ready(self, state: Any, totals: Any) -> None:
        if is_last_rank():
            state.stages[0].conditioning.phi.conv_out.bias.main_grad.mul_(1.001)


BUGS: dict[str, Callable[[], Any]] = {
    "stray_copy": StrayCopy,
    **{function.__name__: function for function in (norm_weights, modulation, text_rows, noise_keys, ring_merge)},
}


def planted_bug(name: str | None) -> contextlib.AbstractContextManager[list[Observer]]:
    """With one bug of :data:`BUGS`, or with none."""
    return planted(BUGS, name)
