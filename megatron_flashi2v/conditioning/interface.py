"""What an image-to-video paradigm is to the DiT: new inputs, and perhaps features added to the tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ConditionedInput:
    """What the first stage embeds.

    Attributes:
        latents_BCTHW: input of the patch embedding, fp32; C is the paradigm's ``input_channels``.
        guidance_BCTHW: a second field over the same grid, embedded by the paradigm's ``embed_guidance`` and added to
            the tokens; None where the paradigm has none.
    """

    latents_BCTHW: Tensor
    guidance_BCTHW: Tensor | None = None


class ImageConditioning(nn.Module, ABC):
    """A paradigm: it lives on the first pipeline stage, and neither the DiT nor the loop knows what it does.

    Attributes:
        input_channels: channels of the patch embedding's input.
    """

    input_channels: int

    @abstractmethod
    def forward(self, noisy_BCTHW: Tensor, image_latents_BC1HW: Tensor, cutoff_ratio_B: Tensor) -> ConditionedInput:
        """Bring the image to the noisy latents.

        Args:
            noisy_BCTHW: sigma * noise + (1 - sigma) * latents, fp32.
            image_latents_BC1HW: normalised latents of the condition image, fp32.
            cutoff_ratio_B: each sample's cutoff ratio in [0, 1] of the Fourier high-pass.
        """

    def embed_guidance(self, patches_SBP: Tensor) -> Tensor:
        """Token features [S, B, d] of the guidance's patches; only called if :meth:`forward` gave guidance."""
        raise TypeError(f"{type(self).__name__} has no guidance to embed")

    def token_modules(self) -> list[nn.Module]:
        """Modules that act on single tokens, so that their gradient on one rank covers only that rank's tokens."""
        return []
