"""Buffer sizes of HCCL's communicators, per kind of process group."""

from __future__ import annotations

from megatron_flashi2v.config.errors import ConfigError

_HIERARCHICAL = tuple(f"HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L{level}" for level in range(2))
WORLD = "default_pg"
"""torch's description of the group of all ranks, which start-up and agreements use."""
GROUP_DESCRIPTIONS = {
    "world": (WORLD,),
    "tp": ("TENSOR_MODEL_PARALLEL_GROUP",),
    "pp": ("PIPELINE_MODEL_PARALLEL_GROUP",),
    "cp": ("CONTEXT_PARALLEL_GROUP", *_HIERARCHICAL),  # the latter carry usp's exchanges: Ulysses', then the ring's
    "dp": ("DATA_PARALLEL_GROUP",),
    "dp_cp": ("DATA_PARALLEL_GROUP_WITH_CP",),
    "mp": ("MODEL_PARALLEL_GROUP",),
    "tp_cp": ("TENSOR_AND_CONTEXT_PARALLEL_GROUP",),
    "tp_dp_cp": ("TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",),
}
"""Our short names of groups, and torch's and megatron-core's descriptions of them (megatron.core.parallel_state)."""
OTHERS = "default"


def parse_buffer_sizes(text: str | None) -> dict[str, int]:
    """``--hccl-buffer-sizes``: "tp:200,dp_cp:400,default:50", in MB.

    Returns:
        A group's description, or :data:`OTHERS` for the groups that are not named, to its size.

    Raises:
        ConfigError: a group is unknown or named twice, or a size is no positive whole number.
    """
    sizes: dict[str, int] = {}
    for part in (text or "").split(",") if text else []:
        name, _, size = part.strip().partition(":")
        known = ", ".join((*GROUP_DESCRIPTIONS, OTHERS))
        if name != OTHERS and name not in GROUP_DESCRIPTIONS:
            raise ConfigError(f"--hccl-buffer-sizes {text}: there is no group {name!r}; choose from {known}")
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--hccl-buffer-sizes {text}: {name} is given {size!r}; write MB, such as {name}:200")
        descriptions = GROUP_DESCRIPTIONS.get(name, (OTHERS,))
        if descriptions[0] in sizes:
            raise ConfigError(f"--hccl-buffer-sizes {text}: {name} is given twice; give it once")
        sizes |= dict.fromkeys(descriptions, int(size))
    return sizes
