"""Named dimensions, from a laptop's to the largest we train; no torch needed to read them."""

from __future__ import annotations

import difflib

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ModelArguments

# tiny: heads and layers enough for TP 4, PP 2 x virtual 2 and Ulysses 4 on a CPU; its text and latent sizes are those
# of the quickstart's data. 1.3b and 14b are Wan2.1's, from which FlashI2V's weights start.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        num_layers=4, hidden_size=192, ffn_hidden_size=512, num_attention_heads=8, text_dim=64, text_length=32
    ),
    "1.3b": ModelConfig(num_layers=30, hidden_size=1536, ffn_hidden_size=8960, num_attention_heads=12),
    "14b": ModelConfig(num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40),
}


def resolve_model(arguments: ModelArguments) -> ModelConfig:
    """The preset with the flags' overrides.

    Raises:
        ConfigError: an unknown preset, or dimensions that do not fit each other.
    """
    preset = PRESETS.get(arguments.model.lower())
    if preset is None:
        close = difflib.get_close_matches(arguments.model, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"--model {arguments.model}: choose one of {', '.join(PRESETS)}{hint}")
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "text_dim", "text_length",
             "latent_channels")
    values = preset.to_json()
    values.update({name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None})
    values.update(
        conditioning=arguments.conditioning,
        phi_kernel_size=[int(side) for side in arguments.phi_kernel.split("x")],
        phi_order=arguments.phi_order,
    )
    return ModelConfig.from_json(values, source="--model")
