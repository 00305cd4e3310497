"""What one block keeps for backward in each mode: the table of the README."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_flashi2v.models.attention import Rotary
from megatron_flashi2v.models.block import TransformerBlock
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.models.recompute import DroppedOutput, Recompute, build_block, run_blocks
from megatron_flashi2v.models.spec import ModelSpec, make_spec
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

CONFIG = dataclasses.replace(PRESETS["1.3b"], num_layers=1, text_length=4)
KEPT = {
    Recompute(): 86, Recompute(inside="selective"): 60, Recompute(inside="skip_attention"): 15, Recompute(layers=1): 3,
}
"""KiB a token and block, rounded."""


@pytest.fixture(scope="module")
def spec() -> Iterator[ModelSpec]:
    with single_process(resolve_device("cpu")) as groups:
        yield make_spec(CONFIG, groups, torch.device("cpu"), bf16=True)


def block_and_inputs(spec: ModelSpec, recompute: Recompute, tokens: int) -> tuple[TransformerBlock, tuple[Any, ...]]:
    block, width = build_block(spec, recompute), CONFIG.hidden_size
    for parameter in block.parameters():
        parameter.data.fill_(0.01)
    hidden = torch.ones(tokens, 1, width, dtype=torch.bfloat16, requires_grad=True)
    text, modulation = torch.ones(CONFIG.text_length, 1, width, dtype=torch.bfloat16), torch.ones(6, 1, width)
    rotary = Rotary(torch.ones(tokens, CONFIG.head_dim // 2), torch.ones(tokens, CONFIG.head_dim // 2), tokens)
    return block, (hidden, text, modulation, rotary)


def kept_bytes(spec: ModelSpec, recompute: Recompute, tokens: int) -> int:
    """Storages that live between forward and backward, parameters and what was emptied not counted."""
    block, inputs = block_and_inputs(spec, recompute, tokens)
    rotary, storages = inputs[-1], {}

    def remember(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = run_blocks([block], recompute, *inputs)  # kept alive: it holds the graph
    shared = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *rotary[:2])}
    assert output.requires_grad
    return sum(storage.nbytes() for key, storage in storages.items() if key not in shared)


@pytest.mark.parametrize("recompute", KEPT, ids=lambda recompute: recompute.inside or f"full-{recompute.layers}")
def test_kept_for_backward(spec: ModelSpec, recompute: Recompute) -> None:
    per_token = (kept_bytes(spec, recompute, 6) - kept_bytes(spec, recompute, 2)) / 4
    assert round(per_token / 1024) == KEPT[recompute]


@pytest.mark.parametrize("frozen", [(), ("mlp.linear_fc2", ), ("self_attention", "cross_attention", "mlp")])
def test_what_frozen_linears_read_is_not_filled_again(
    spec: ModelSpec, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They kept none of it for their backward."""
    drop, filled = DroppedOutput.drop, []

    def counted(self: DroppedOutput, output: Tensor, again: Callable[..., Any], *inputs: Any) -> None:
        drop(self, output, lambda *given, **into: filled.append(again(*given, **into)), *inputs)

    monkeypatch.setattr(DroppedOutput, "drop", counted)
    block, inputs = block_and_inputs(spec, Recompute(inside="selective"), 6)
    for name in frozen:
        block.get_submodule(name).requires_grad_(False)
    run_blocks([block], Recompute(inside="selective"), *inputs).sum().backward()
    assert len(filled) == {0: 4, 1: 3, 3: 0}[len(frozen)]
    assert inputs[0].grad.isfinite().all()
