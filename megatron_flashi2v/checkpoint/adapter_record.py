"""``adapter.json``: what a checkpoint of a part of a model holds, and of which base.

Such a checkpoint has the folder and the files of any other; among its tensors are only the trained ones. Its
``model_config.json`` is the base's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.adapter_table import adapter_shapes
from megatron_flashi2v.checkpoint.arrangements import Shape
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.runtime.files import read_json_object

ADAPTER_NAME = "adapter.json"


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """What a checkpoint holds of a model.

    Attributes:
        adapter: its low-rank pairs; None if whole tensors alone were trained.
        trained: our names of the whole tensors that were trained, beside any pairs.
        train_only: the regular expression that picked some of them; None for those alone that the base lacks.
        base: where training found the base, as FORMAT:PATH with an absolute path.
        base_weights: which of its weights: ``model`` or ``ema``.
        base_fingerprint: of these weights (``conversion.base_fingerprint``).
    """

    adapter: AdapterConfig | None
    trained: tuple[str, ...]
    base: str
    base_weights: str
    base_fingerprint: str
    train_only: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The contents of ``adapter.json``."""
        pairs = self.adapter.to_json() if self.adapter else {"rank": 0, "alpha": 0.0, "targets": []}
        return {
            **pairs, "trained": list(self.trained), "train_only": self.train_only, "base": self.base,
            "base_weights": self.base_weights, "base_fingerprint": self.base_fingerprint,
        }

    @property
    def base_flags(self) -> str:
        """The flags of a run beside the same base."""
        kind = "" if self.base_weights == "model" else f" --load-weights-kind {self.base_weights}"
        return f"--load-weights {self.base}{kind}"

    def shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Names and shapes of the tensors that such a checkpoint holds.

        Raises:
            CheckpointError: the model has no tensor of a trained name.
        """
        whole = parameter_shapes(config)
        unknown = [name for name in self.trained if name not in whole]
        if unknown:
            raise CheckpointError(
                f"{ADAPTER_NAME} names {', '.join(unknown[:3])} as trained, which a {config.conditioning} model has "
                "not; use the version of this package that wrote it"
            )
        return {name: whole[name] for name in self.trained} | adapter_shapes(config, self.adapter)


def read_adapter_record(folder: Path) -> AdapterRecord | None:
    """Read what a checkpoint holds of a model; None of a checkpoint that holds all of it.

    Args:
        folder: an ``iter_*`` folder.

    Raises:
        CheckpointError: the file is malformed.
    """
    path = folder / ADAPTER_NAME
    if not path.is_file():
        return None
    values = read_json_object(path, error=CheckpointError)
    try:
        adapter = None
        if values["rank"]:
            adapter = AdapterConfig(
                rank=values["rank"], alpha=float(values["alpha"]), targets=tuple(values["targets"])
            )
        return AdapterRecord(
            adapter=adapter, trained=tuple(map(str, values["trained"])), base=str(values["base"]),
            base_weights=str(values["base_weights"]), base_fingerprint=str(values["base_fingerprint"]),
            train_only=values.get("train_only"),
        )
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
