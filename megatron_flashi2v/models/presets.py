"""Named dimensions, from a laptop's to the largest we train; no torch needed to read them."""

from __future__ import annotations

import difflib

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ModelArguments

# tiny: heads and layers enough for TP 4, PP 2 x virtual 2 and Ulysses 4 on a CPU; its text and latent sizes are those
# of the quickstart's data. 1.3b and 14b are Wan2.1's, from which FlashI2V's weights start. The rest is a ladder for
# scaling experiments: each rung has 2.0 to 2.4 times the parameters of the one below. Heads are 128 wide as Wan's, 64
# where there would be too few of them; the feed-forward width is 6 times the model's below 1.3b (5.8 there), and falls
# as a power of the width between 1.3b and 14b (2.7). 130m, 600m, 7b and 14b divide over TP 8, the others over TP 4.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        num_layers=4, hidden_size=192, ffn_hidden_size=512, num_attention_heads=8, text_dim=64, text_length=32
    ),
    "130m": ModelConfig(num_layers=24, hidden_size=512, ffn_hidden_size=3072, num_attention_heads=8),
    "300m": ModelConfig(num_layers=24, hidden_size=768, ffn_hidden_size=4608, num_attention_heads=12),
    "600m": ModelConfig(num_layers=28, hidden_size=1024, ffn_hidden_size=6144, num_attention_heads=8),
    "1.3b": ModelConfig(num_layers=30, hidden_size=1536, ffn_hidden_size=8960, num_attention_heads=12),
    "3b": ModelConfig(num_layers=30, hidden_size=2560, ffn_hidden_size=10752, num_attention_heads=20),
    "7b": ModelConfig(num_layers=30, hidden_size=4096, ffn_hidden_size=12800, num_attention_heads=32),
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
        image_dim=arguments.image_embed_dim,
    )
    return ModelConfig.from_json(values, source="--model")
