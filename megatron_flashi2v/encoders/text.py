"""The frozen text encoder: transformers' UMT5EncoderModel and its tokenizer, one row per token.

Shapes: L tokens, D text_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.folders import model_folder, read_model_config, require_all_weights, require_files
from megatron_flashi2v.runtime.logging import AGREED, ONCE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TextEncoder:
    """Prompts to rows at their real length; no gradients.

    The reference pads to ``text_length``, masks the padding, and zeroes the rows past the real length (FlashI2V's
    ``flashi2v/modules/t5.py``, branch main). Masked tokens do not change the others, so each prompt is encoded alone
    without padding: the same rows whatever shares its batch, at a fraction of the work. Zero rows are appended when
    samples are loaded.

    Args:
        model: a UMT5EncoderModel, loaded and on its device; it is put into evaluation mode.
        tokenizer: must append the end token, so that the empty prompt has a row.
        text_length: longer prompts are cut to this many tokens.
        source: folders that they came from, for errors.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, text_length: int, *, source: str
    ) -> None:
        if text_length < 1:
            raise ConfigError(f"text_length is {text_length}; it must be at least 1")
        if len(tokenizer) > model.config.vocab_size:
            raise ConfigError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens, the text encoder's vocab_size is "
                f"{model.config.vocab_size}; they do not belong together"
            )
        if not tokenizer("").input_ids:
            raise ConfigError(f"{source}: the tokenizer appends no end token, so the empty prompt would have no rows")
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.text_length = text_length
        self.text_dim: int = model.config.d_model

    @classmethod
    def load(
        cls,
        text_encoder_folder: Path | str,
        tokenizer_folder: Path | str,
        text_length: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoder:
        """Read transformers folders (safetensors weights only), as :func:`model_folder` finds them.

        Args:
            text_encoder_folder: usually ``text_encoder`` in a pipeline's folder.
            tokenizer_folder: usually ``tokenizer`` in a pipeline's folder.
            text_length: longer prompts are cut to this many tokens.
            device: where it runs.
            dtype: of weights, computation and rows.

        Raises:
            ConfigError: a file is missing or malformed, or the folders do not belong together.
        """
        folder = model_folder(Path(text_encoder_folder), "text encoder")
        tokenizer_folder = model_folder(Path(tokenizer_folder), "tokenizer")
        kind = read_model_config(folder, "text encoder").get("model_type")
        if kind != "umt5":
            raise ConfigError(f"text encoder folder {folder}: config.json's model_type is {kind!r}; it must be umt5")
        require_files(folder, "text encoder", "*.safetensors")
        require_files(tokenizer_folder, "tokenizer", "tokenizer*")
        from safetensors import SafetensorError
        from transformers import AutoTokenizer, UMT5EncoderModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"tokenizer folder {tokenizer_folder}: cannot be loaded ({error})") from error
        try:
            loaded: Any = UMT5EncoderModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            raise ConfigError(f"text encoder folder {folder}: cannot be loaded ({error})") from error
        model, report = loaded
        require_all_weights(folder, "text encoder", list(report["missing_keys"]))
        source = f"{folder} with {tokenizer_folder}"
        return cls(model.to(device=device, dtype=dtype), tokenizer, text_length, source=source)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the rows, JSON-ready."""
        return {
            "class": "UMT5EncoderModel",
            "text_dim": self.text_dim,
            "text_length": self.text_length,
            "num_layers": self._model.config.num_layers,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Encode cleaned prompts.

        Args:
            prompts: the empty string gives the single row of the end token.

        Returns:
            One [L, D] tensor per prompt on the encoder's device, 1 <= L <= text_length.
        """
        return [self._encode_one(prompt) for prompt in prompts]

    def _encode_one(self, prompt: str) -> torch.Tensor:
        tokens = self._tokenizer(
            prompt,
            truncation=True,
            max_length=self.text_length,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._model.device)
        if any(encoding.overflowing for encoding in tokens.encodings or ()):
            logger.warning(
                "a text is longer than the model's %d text rows: what follows is left out (told once; it begins %r)",
                self.text_length, prompt[:60], extra={**AGREED, **ONCE},
            )
        output = self._model(tokens.input_ids, attention_mask=tokens.attention_mask)
        rows_LD: torch.Tensor = output.last_hidden_state[0]
        return rows_LD
