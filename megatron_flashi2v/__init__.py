"""Large-scale training of FlashI2V image-to-video diffusion transformers on megatron-core."""

from typing import Any

from megatron_flashi2v.version import __version__ as __version__


def __getattr__(name: str) -> Any:
    """``FlashI2VPipeline`` and its component, imported (with torch and diffusers) only when they are asked for."""
    if name in ("FlashI2VPipeline", "FlashI2VImageConditioning"):
        from importlib import import_module

        return getattr(import_module("megatron_flashi2v.release.pipeline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
