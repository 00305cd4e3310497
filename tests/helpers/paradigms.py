"""Names of the built-in paradigms."""

from megatron_flashi2v.conditioning.build import BUILT_IN

PARADIGMS = tuple(paradigm.name for paradigm in BUILT_IN)
