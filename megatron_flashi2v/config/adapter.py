"""Training a part of a model: low-rank adapters beside frozen linears, and whole tensors picked by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_flashi2v.config.bounds import Above, AtLeast
from megatron_flashi2v.config.errors import ConfigError

ATTENTION = tuple(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo")
"""What trainers of adapters for Wan take by default: queries, keys, values and outputs of both attentions."""
IMAGE_BRANCH = ("cross_attn.k_img", "cross_attn.v_img")
"""Linears of models that attend to an image encoder's rows alone."""
LINEARS = (*ATTENTION, *IMAGE_BRANCH, "ffn.0", "ffn.2")
"""Every linear of a block that can have an adapter, by its name in Wan's original."""
_DIFFUSERS = {
    **{f"{wan}.{part}": f"{theirs}.to_{part}" for wan, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
       for part in "qkv"},
    "self_attn.o": "attn1.to_out.0", "cross_attn.o": "attn2.to_out.0", "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
"""The same linears' names in diffusers, which targets may have too."""


@dataclass(frozen=True, kw_only=True)
class AdapterArguments:
    """Adapters (LoRA), and training of a part of the weights."""

    lora_rank: Annotated[int | None, AtLeast(1)] = None
    """Train low-rank adapters of this rank beside the frozen weights of --load-weights, such as 32."""
    lora_alpha: Annotated[float | None, Above(0)] = None
    """Adapters add alpha / rank * B A x to W x; by default alpha is the rank."""
    lora_targets: tuple[str, ...] = ()
    """Linears that have adapters, by Wan's names or parts of these: self_attn.q, q (of both attentions), self_attn,
    cross_attn, ffn or all, or diffusers' such as to_q, apart or with commas; by default q, k, v and o of both
    attentions."""
    load_adapter: Path | None = None
    """Start a new run's adapters from this one: a file of diffusers', ComfyUI's, peft's or kohya's, or a --save folder
    of a run beside the same base. --lora-rank, --lora-alpha and --lora-targets are given as it has them; targets that
    it lacks start as drawn."""
    train_only: str | None = None
    """Train whole the tensors in whose name, ours or Wan's, this regular expression is found, such as phi|head, beside
    adapters if --lora-rank is given; the rest of --load-weights stays frozen. Tensors that --load-weights lacks are
    trained in any case."""

    @property
    def is_partial(self) -> bool:
        """Whether some weights stay frozen."""
        return self.lora_rank is not None or self.train_only is not None


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank pairs beside a model's linears: y = W x + (alpha / rank) B A x.

    Attributes:
        rank: rows of A, columns of B.
        alpha: the scale's numerator.
        targets: Wan's names of the linears of every block that have a pair, out of :data:`LINEARS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1 or not self.alpha > 0:
            raise ConfigError(f"an adapter has rank {self.rank!r} and alpha {self.alpha!r}; both must be above 0")
        unknown = [name for name in self.targets if name not in LINEARS]
        if unknown or not self.targets:
            raise ConfigError(f"an adapter has the targets {list(self.targets)}; choose from {', '.join(LINEARS)}")

    @property
    def scale(self) -> float:
        """What B A x is multiplied with."""
        return self.alpha / self.rank

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}


def adapter_of(arguments: AdapterArguments, *, has_image_branch: bool) -> AdapterConfig | None:
    """The adapters that the flags ask for; None without --lora-rank.

    Args:
        arguments: flags.
        has_image_branch: whether the model attends to an image encoder's rows.

    Raises:
        ConfigError: a target names no linear of this model.
    """
    if arguments.lora_rank is None:
        return None
    there = [name for name in LINEARS if has_image_branch or name not in IMAGE_BRANCH]
    targets = [name.strip() for target in arguments.lora_targets for name in target.split(",") if name.strip()]
    chosen = set() if targets else set(ATTENTION)
    for target in targets:
        found = [name for name in there if target == "all" or _is_part(target, name)]
        if not found:
            raise ConfigError(
                f"--lora-targets {target} names no linear of this model; choose from {', '.join(there)}, parts of "
                "these such as q, self_attn or ffn, or all"
            )
        chosen.update(found)
    return AdapterConfig(
        rank=arguments.lora_rank, alpha=float(arguments.lora_alpha or arguments.lora_rank),
        targets=tuple(name for name in there if name in chosen),
    )


def _is_part(target: str, name: str) -> bool:
    """Whether a target is a name of the linear, Wan's or diffusers', or stands before or after dots in it."""
    part = re.compile(rf"(^|\.){re.escape(target)}(\.|$)")
    return not target.isdecimal() and any(part.search(known) for known in (name, _DIFFUSERS[name]))
