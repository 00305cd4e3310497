"""The component of a release that brings the image to diffusers' transformer: the paradigm's module, for inference.

The paradigm's own class computes; the component holds its weights in the shapes and under the names of FlashI2V's main
branch, from the key table. Paradigms without weights are their configuration.

Shape suffixes: B samples, C latent channels, T latent frames, H and W latent rows and columns, S tokens, P values in a
patch, D width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.func import functional_call

from megatron_flashi2v.checkpoint.key_table import Mapped, conditioning_mappings
from megatron_flashi2v.conditioning.build import build_conditioning, read_model_config
from megatron_flashi2v.conditioning.interface import ConditionedInput, Extras, ImageConditioning
from megatron_flashi2v.models.patches import patchify, token_grid

COLUMN = "wan"
"""Of the key table: FlashI2V's main branch has Wan's names."""


class FlashI2VImageConditioning(ModelMixin, ConfigMixin):
    """Makes a transformer's input from noisy latents and the image's, by the paradigm that the model was trained with.

    Arguments are the fields of :class:`~megatron_flashi2v.config.model.ModelConfig`. A paradigm of another package must
    be registered (``conditioning.build.register``) before its release is loaded.
    """

    @register_to_config
    def __init__(
        self,
        num_layers: int = 30,
        hidden_size: int = 1536,
        ffn_hidden_size: int = 8960,
        num_attention_heads: int = 12,
        latent_channels: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        freq_dim: int = 256,
        text_dim: int = 4096,
        text_length: int = 512,
        norm_eps: float = 1e-6,
        conditioning: str = "flashi2v",
        phi_kernel_size: Sequence[int] = (1, 3, 3),
        phi_hidden_channels: int = 64,
        phi_order: str = "conv_then_broadcast",
        mask_channels: int = 4,
        image_dim: int = 1280,
        image_rows: int = 257,
        text_cleaning: str = "full",
    ) -> None:
        super().__init__()
        settings = {key: value for key, value in self.config.items() if not key.startswith("_")}
        self.model_config = read_model_config(
            {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            source="image_conditioning/config.json",
        )
        # A component without parameters must still know its device.
        self.register_buffer("place", torch.zeros(()), persistent=False)
        with torch.device("meta"):  # it computes with the parameters below, and has no values of its own
            methods = _Methods(build_conditioning(self.model_config, None, torch.bfloat16))
        self._methods = (methods,)  # in a tuple, or its parameters would be this component's
        self._exact = {name for name, value in methods.named_parameters() if value.dtype == torch.float32}
        self._entries = tuple(conditioning_mappings(self.model_config, COLUMN))
        for entry in self._entries:
            (name,) = entry.external
            _add_parameter(self, name, nn.Parameter(torch.zeros(entry.external_shape)))
        # Of diffusers: parameters that do not tell this component's dtype.
        self._keep_in_fp32_modules = [entry.external[0] for entry in self._entries if entry.ours in self._exact]

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> FlashI2VImageConditioning:
        """As diffusers' models load; parameters that the paradigm holds in fp32 stay so in any dtype.

        Args:
            path: folder, or Hub repository with ``subfolder``.
            options: as of ``ModelMixin.from_pretrained``.
        """
        wanted = [options.pop(name, None) for name in ("dtype", "torch_dtype")]
        places = ("subfolder", "revision", "cache_dir", "local_files_only", "token", "force_download", "proxies")
        config: Any = cls.load_config(path, **{key: options[key] for key in places if key in options})
        with torch.device("meta"):
            has_weights = bool(cls.from_config(config)._entries)
        # Without weights there is no file of them.
        component: FlashI2VImageConditioning = (
            super().from_pretrained(path, **options) if has_weights else cls.from_config(config).eval()
        )
        dtype = next((dtype for dtype in wanted if isinstance(dtype, torch.dtype)), None)
        if dtype is not None:
            component.register_buffer("place", component.get_buffer("place").to(dtype), persistent=False)
            for entry in component._entries:
                parameter = component.get_parameter(*entry.external)
                parameter.data = parameter.data.to(torch.float32 if entry.ours in component._exact else dtype)
        return component

    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, extras: Extras) -> ConditionedInput:
        """The transformer's input, and the paradigm's guidance if it has any.

        Args:
            noisy_BCTHW: state of the sampler, not shifted, fp32.
            image_latents_BC1HW: normalised latents of the image, fp32.
            extras: the paradigm's settings and draws, one row per sample.
        """
        return self._call("forward", noisy_BCTHW, image_latents_BC1HW, extras)

    @contextlib.contextmanager
    def guiding(self, transformer: nn.Module, guidance_BCTHW: Tensor | None) -> Iterator[None]:
        """Add the embedded guidance to the transformer's tokens while open; None adds nothing.

        diffusers' transformer has no input for it; it joins the output of the patch embedding.
        """
        if guidance_BCTHW is None:
            yield
            return
        _, _, frames, height, width = guidance_BCTHW.shape
        patch_size = self.model_config.patch_size
        features_SBD = self._call("embed_guidance", patchify(guidance_BCTHW, patch_size))
        grid = token_grid((frames, height, width), patch_size)
        features_BDTHW = features_SBD.permute(1, 2, 0).unflatten(2, grid)

        def add(module: nn.Module, inputs: Any, tokens_BDTHW: Tensor) -> Tensor:
            return tokens_BDTHW + features_BDTHW.to(tokens_BDTHW.dtype)

        handle = transformer.get_submodule("patch_embedding").register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _call(self, method: str, *arguments: Any) -> Any:
        """A method of the paradigm's module with this component's weights; those that it holds in fp32 are in fp32."""
        weights = {entry.ours: self._weight(entry) for entry in self._entries}
        return functional_call(*self._methods, weights, (method, *arguments))

    def _weight(self, entry: Mapped) -> Tensor:
        weight = entry.to_ours([self.get_parameter(name) for name in entry.external])
        return weight.float() if entry.ours in self._exact else weight


class _Methods(nn.Module):
    """Lets ``functional_call`` reach every method of a paradigm's module."""

    def __init__(self, conditioning: ImageConditioning) -> None:
        super().__init__()
        self.conditioning = conditioning

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self.conditioning, method)(*arguments)


def _add_parameter(root: Any, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, with the modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)
