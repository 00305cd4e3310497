"""Names and shapes of adapters' tensors: rows of the key table beside those of the linears that they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_flashi2v.checkpoint.arrangements import Same, Shape
from megatron_flashi2v.checkpoint.key_table import Mapped, mappings
from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.placement import adapter_name, fused_parts

FACTORS = ("lora_A", "lora_B")
_LINEAR_OF_BLOCK = re.compile(r"blocks\.\d+\.(.+)\.weight")
_SAME = Same()


def adapter_mappings(config: ModelConfig, adapter: AdapterConfig, column: str) -> Iterator[Mapped]:
    """Yield A [rank, in] and B [out, rank] of every pair, in the order of the model's linears.

    External names are the linear's with ``.lora_A.weight`` and ``.lora_B.weight``, such as
    ``blocks.0.self_attn.q.lora_A.weight`` in the column ``wan`` and ``blocks.0.attn1.to_q.lora_A.weight`` in
    ``diffusers``. No value is rearranged.

    Args:
        config: the base model's.
        adapter: rank and targets.
        column: of the key table.
    """
    # The paradigm's own tensors, which not all columns have, come last.
    for wan, theirs in zip(mappings(config, "wan"), mappings(config, column), strict=False):
        parts = fused_parts(wan.ours) or ("",)
        for part, original, external in zip(parts, wan.external, theirs.external, strict=True):
            linear = _LINEAR_OF_BLOCK.fullmatch(original)
            if linear is None or linear[1] not in adapter.targets:
                continue
            rows, columns = wan.external_shape
            shapes: dict[str, Shape] = {"lora_A": (adapter.rank, columns), "lora_B": (rows, adapter.rank)}
            for factor in FACTORS:
                yield Mapped(
                    ours=adapter_name(wan.ours.removesuffix(".weight"), part, factor),
                    shape=shapes[factor],
                    external=(f"{external.removesuffix('.weight')}.{factor}.weight",),
                    external_shape=shapes[factor],
                    transform=_SAME,
                    heads=config.num_attention_heads,
                )


def adapter_shapes(config: ModelConfig, adapter: AdapterConfig | None) -> dict[str, Shape]:
    """Our global names and shapes of all of an adapter's tensors."""
    if adapter is None:
        return {}
    return {mapped.ours: mapped.shape for mapped in adapter_mappings(config, adapter, "wan")}
