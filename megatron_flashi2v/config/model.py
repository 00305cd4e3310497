"""The model's dimensions and image conditioning, which a checkpoint records to be rebuilt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_flashi2v.config.bounds import AtLeast, check_bounds
from megatron_flashi2v.config.errors import ConfigError

PHI_ORDERS = ("conv_then_broadcast", "repeat_then_conv")
FREE_OF_WEIGHTS = ("text_length", "text_cleaning", "image_rows")
"""Fields that weights can be taken over from without being equal."""


Count = Annotated[int, AtLeast(1)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions of the DiT and of its conditioning; written as ``model_config.json`` into every checkpoint.

    Attributes:
        num_layers: transformer blocks.
        hidden_size: width ``d`` of the residual stream.
        ffn_hidden_size: width of the feed-forward layer.
        num_attention_heads: heads; ``hidden_size / num_attention_heads`` must be even (rotary pairs).
        latent_channels: channels of the VAE's latents, in and out.
        patch_size: latent frames, rows and columns that make one token.
        freq_dim: width of the sinusoid of the timestep.
        text_dim: width of the text encoder's rows.
        text_length: rows that the DiT attends to; shorter texts are padded with zero rows.
        norm_eps: epsilon of every norm.
        conditioning: name of the image-to-video paradigm; the list of paradigms checks it when the model is made or
            read (``conditioning.build``).
        phi_kernel_size: kernel of FlashI2V's latent shift, (1, 3, 3) or (3, 3, 3).
        phi_hidden_channels: width between the two convolutions of the latent shift.
        phi_order: whether the shift is computed on the single image frame and broadcast over time, or on the
            frame repeated over time (what the released 3x3x3 weights need); one of :data:`PHI_ORDERS`.
        mask_channels: channels of inpainting's mask: video frames for each latent frame (the VAE's temporal stride).
        image_dim: width of the image encoder's rows that cross-attention reads, where the paradigm has such a branch; 0
            without it, as in Wan2.2's models.
        image_rows: how many such rows an image has: the encoder's patches and its class token.
        text_cleaning: how captions were cleaned before tokenising; inference must do the same.
    """

    num_layers: Count
    hidden_size: Count
    ffn_hidden_size: Count
    num_attention_heads: Count
    latent_channels: Count = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: Count = 256
    text_dim: Count = 4096
    text_length: Count = 512
    norm_eps: float = 1e-6
    conditioning: str = "flashi2v"
    phi_kernel_size: tuple[int, int, int] = (1, 3, 3)
    phi_hidden_channels: Count = 64
    phi_order: str = "conv_then_broadcast"
    mask_channels: Count = 4
    image_dim: Annotated[int, AtLeast(0)] = 1280
    image_rows: Count = 257
    text_cleaning: str = "full"

    def __post_init__(self) -> None:
        check_bounds(self, as_flags=False)
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} must be an "
                "even whole number (rotary embeddings turn pairs of channels)"
            )
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim is {self.freq_dim}; it must be even (cosines and sines)")
        if not isinstance(self.conditioning, str):
            raise ConfigError(f"conditioning is {self.conditioning!r}; it must be a paradigm's name")
        if self.phi_order not in PHI_ORDERS:
            raise ConfigError(f"phi_order is {self.phi_order!r}; choose one of {', '.join(PHI_ORDERS)}")
        for field in ("patch_size", "phi_kernel_size"):
            sides = getattr(self, field)
            if not isinstance(sides, tuple) or [type(side) for side in sides] != [int] * 3 or min(sides) < 1:
                raise ConfigError(f"{field} is {sides!r}; it must be three whole numbers of at least 1")
        if any(side % 2 == 0 for side in self.phi_kernel_size):
            raise ConfigError(f"phi_kernel_size is {self.phi_kernel_size}; each side must be odd ('same' padding)")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Values in one token's patch of latents."""
        time, height, width = self.patch_size
        return self.latent_channels * time * height * width

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; tuples become lists."""
        return {key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, source: str) -> ModelConfig:
        """The reverse of :meth:`to_json`; ``source`` names the file in errors.

        Raises:
            ConfigError: an unknown, missing or malformed key.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{source}: unknown keys {', '.join(unknown)}; it may come from a newer version")
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        missing = sorted(required - set(values))
        if missing:
            raise ConfigError(f"{source}: missing keys {', '.join(missing)}")
        fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
        try:
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
