"""How often a block launches a Triton kernel of ours: one more costs a pass over memory in every block."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from typing import Any

import pytest
import torch

from flashi2v_kernels.registry import load_entry_point, specs_of
from megatron_flashi2v.models.attention import Rotary
from megatron_flashi2v.models.presets import PRESETS
from megatron_flashi2v.models.recompute import Recompute, build_block
from megatron_flashi2v.models.spec import ELEMENTWISE, make_spec
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

# norm of self-attention; norms of cross-attention and feed-forward, with the sums before them or after them; the last
# gated sum; GELU; norms of queries and keys in both attentions
ONE_WAY = {
    "triton": {"norm": 3, "gate": 2, "gelu": 1, "turn": 4},
    "triton_fused": {"norm": 1, "residual_norm": 2, "gate": 1, "gelu": 1, "turn": 4},
}
AGAIN = {None: {}, "selective": {"norm": 3, "gelu": 1}}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; the extra 'test' brings it"
)


@pytest.mark.parametrize("inside", AGAIN)
@pytest.mark.parametrize("name", ONE_WAY)
def test_launches_of_a_block(name: str, inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward are ten each, or nine; recomputation adds the norms without their sums, and GELU."""
    from flashi2v_kernels import triton_launch

    launched: Counter[str] = Counter()
    monkeypatch.setattr(triton_launch, "launch", lambda kernel, *_, **__: launched.update([kernel.fn.__name__]))
    with single_process(resolve_device("cpu")) as groups:
        spec = make_spec(PRESETS["tiny"], groups, torch.device("cpu"), bf16=True)
        triton = {}
        for operator in ELEMENTWISE:
            known = {spec.name: spec for spec in specs_of(operator)}
            triton[operator] = load_entry_point(known.get(name, known["triton"]))
        spec = dataclasses.replace(spec, kernels=dataclasses.replace(spec.kernels, **triton))
        block, config = build_block(spec, Recompute(inside=inside)), spec.config
        for parameter in block.parameters():
            parameter.data.zero_()
        hidden, text = (torch.zeros(6, 2, config.hidden_size, dtype=torch.bfloat16) for _ in range(2))
        angles = torch.zeros(6, config.head_dim // 2)
        output = block(hidden.requires_grad_(), text, torch.zeros(6, 2, config.hidden_size), Rotary(angles, angles, 6))
        output.backward(torch.zeros_like(output))
    expected = Counter({f"{kind}_{way}": n for kind, n in ONE_WAY[name].items() for way in ("forward", "backward")})
    expected.update({f"{kind}_forward": count for kind, count in AGAIN[inside].items()})
    assert launched == expected
