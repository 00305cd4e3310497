"""The frozen models that sampling needs: where they lie, given or in a release, and the image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.fields import spelling
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.formats import diffusers
from megatron_flashi2v.encoders.image import ImageEncoder
from megatron_flashi2v.runtime.files import read_json_object


def is_release(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline's, such as ``flashi2v convert --to diffusers`` writes."""
    return (folder / diffusers.PIPELINE_NAME).is_file()


@dataclass(frozen=True, kw_only=True)
class FrozenFolders:
    """Where the frozen models lie: folders, or OWNER/NAME:SUBFOLDER of Hub repositories."""

    vae: Path
    text_encoder: Path
    tokenizer: Path
    image_encoder: Path | None = None

    @classmethod
    def find(
        cls, checkpoint: Path, *, vae: Path | None, text_encoder: Path | None, tokenizer: Path | None,
        image_encoder: Path | None,
    ) -> FrozenFolders:
        """Those that are given, and of the others those that a release holds or names.

        Args:
            checkpoint: see :func:`resolve_checkpoint`.
            vae: None takes the release's.
            text_encoder: likewise.
            tokenizer: likewise.
            image_encoder: likewise; few models have one.

        Raises:
            ConfigError: one is neither given nor in the release, or there is no release.
        """
        given = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        missing = [name for name, place in given.items() if place is None]
        held: Mapping[str, Path] = _parts_of_release(checkpoint, missing) if missing else {}
        if image_encoder is None:
            image_encoder = _parts_of_release(checkpoint, ["image_encoder"]).get("image_encoder")
        absent = [spelling(name) for name in missing if name not in held]
        if absent:
            why = "is a release without these parts" if is_release(checkpoint) else "is no release, which holds them"
            raise ConfigError(f"{', '.join(absent)} must be given: --load {checkpoint} {why}")
        places = {name: held[name] if place is None else place for name, place in given.items()}
        return cls(**places, image_encoder=image_encoder)


def _parts_of_release(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Those of the named parts that a release holds, or says where they lie; none of what is no release."""
    if not is_release(folder):
        return {}
    references = read_json_object(folder / diffusers.PIPELINE_NAME, error=CheckpointError).get(diffusers.REFERENCES)
    references = references if isinstance(references, dict) else {}
    parts = {name: folder / name for name in names if (folder / name).is_dir()}
    return {name: Path(str(references[name])) for name in names if name in references} | parts


def load_image_encoder(folder: Path | None, model: ModelConfig, device: torch.device) -> ImageEncoder | None:
    """The image encoder whose rows the model attends to; None for a model that attends to none.

    Raises:
        ConfigError: the model needs one and ``folder`` is None, or the folder is missing or damaged.
    """
    if not paradigm_of(model).image_rows(model):
        return None
    if folder is None:
        raise ConfigError(
            f"--image-encoder must be given: the model's conditioning is {model.conditioning}, which attends to an "
            "image encoder's rows"
        )
    return ImageEncoder.load(folder, device)
