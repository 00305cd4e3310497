"""Targets of adapters by the names that people know."""

from __future__ import annotations

import pytest

from megatron_flashi2v.config.adapter import ATTENTION, LINEARS, AdapterArguments, adapter_of
from megatron_flashi2v.config.errors import ConfigError


def targets(*names: str) -> tuple[str, ...]:
    adapter = adapter_of(AdapterArguments(lora_rank=2, lora_targets=names), has_image_branch=True)
    assert adapter is not None
    return adapter.targets


@pytest.mark.parametrize("names, expected", [
    ((), ATTENTION),
    (("all",), LINEARS),
    (("to_q", "to_k"), ("self_attn.q", "self_attn.k", "cross_attn.q", "cross_attn.k")),
    (("q,k,v,o",), ATTENTION),
    (("q,", "k", "v,o"), ATTENTION),
    (("to_q", "to_k", "to_v", "to_out.0"), ATTENTION),
    (("to_out",), ("self_attn.o", "cross_attn.o")),
    (("attn1",), ATTENTION[:4]),
    (("attn2.add_k_proj", "ffn.net.0.proj"), ("cross_attn.k_img", "ffn.0")),
    (("ffn.net.2",), ("ffn.2",)),
    (("ffn",), ("ffn.0", "ffn.2")),
])
def test_names(names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert targets(*names) == expected


@pytest.mark.parametrize("name", ["0", "to", "attn", "query"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--lora-targets {name} names no linear"):
        targets(name)
