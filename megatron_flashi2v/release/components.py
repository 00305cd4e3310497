"""The frozen parts of a release, VAE, text encoder, tokenizer and image encoder: copied into it, or named there."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.formats.diffusers import REFERENCES
from megatron_flashi2v.encoders.folders import model_folder, read_model_config, require_files
from megatron_flashi2v.encoders.image import PROCESSOR_FILE, PROCESSOR_FOLDER, processor_folder
from megatron_flashi2v.runtime.files import read_json_object

_FOLDER_ENDINGS = (".json", ".safetensors", ".model", ".txt")
_IMAGE_ENCODER, _PROCESSOR_CLASS = "image_encoder", ("transformers", "CLIPImageProcessor")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a release.

    Attributes:
        name: ``vae``, ``text_encoder``, ``tokenizer``, ``image_encoder`` or ``image_processor``.
        library: of its class.
        class_name: its class.
        folder: where it lies; None for a Hub repository.
        reference: the folder's absolute path or the repository, as ``OWNER/NAME:SUBFOLDER``.
    """

    name: str
    library: str
    class_name: str
    folder: Path | None
    reference: str

    def files(self) -> list[Path]:
        """The files to copy: configurations, vocabularies and safetensors, never a pickle."""
        assert self.folder is not None
        if self.name == PROCESSOR_FOLDER:  # which may be the image encoder's folder
            return [self.folder / PROCESSOR_FILE]
        return sorted(path for path in self.folder.iterdir() if path.is_file() and path.suffix in _FOLDER_ENDINGS)

    def nbytes(self) -> int:
        """Bytes of :meth:`files`."""
        return sum(path.stat().st_size for path in self.files())

    def copy(self, target: Path) -> None:
        """Copy into a new folder."""
        target.mkdir()
        for path in self.files():
            shutil.copyfile(path, target / path.name)


def find_components(places: Mapping[str, str]) -> list[Component]:
    """The parts of a release that are given, by name, and an image encoder's processor with it.

    Raises:
        ConfigError: as of :func:`find_component`.
    """
    found = [find_component(name, place) for name, place in places.items()]
    encoder = next((component for component in found if component.name == _IMAGE_ENCODER), None)
    if encoder is not None and encoder.folder is not None:
        found.append(find_component(PROCESSOR_FOLDER, str(processor_folder(encoder.folder))))
    elif encoder is not None:  # diffusers' layout of a repository
        found.append(find_component(PROCESSOR_FOLDER, encoder.reference.partition(":")[0] + f":{PROCESSOR_FOLDER}"))
    return found


def find_component(name: str, place: str) -> Component:
    """Recognise a part of a release in a folder, or name its Hub repository.

    Args:
        name: as of :class:`Component`.
        place: a folder, a release with the part in its subfolder, or a Hub repository as ``OWNER/NAME:SUBFOLDER``.

    Raises:
        ConfigError: the place is neither, or the folder holds something else.
    """
    folder = Path(place)
    if not folder.is_dir():
        if not _REPOSITORY.fullmatch(place):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} {place}: no such folder, and no repository of the form OWNER/NAME:SUBFOLDER")
        library, class_name = {
            "vae": ("diffusers", "AutoencoderKLWan"),
            "text_encoder": ("transformers", "UMT5EncoderModel"),
            "tokenizer": ("transformers", "AutoTokenizer"),
            _IMAGE_ENCODER: ("transformers", "CLIPVisionModel"),
            PROCESSOR_FOLDER: _PROCESSOR_CLASS,
        }[name]
        return Component(name=name, library=library, class_name=class_name, folder=None, reference=place)
    if name != PROCESSOR_FOLDER:
        folder = model_folder(folder, "VAE" if name == "vae" else name.replace("_", " "))
    library, class_name = _LOOK[name](folder)
    return Component(
        name=name, library=library, class_name=class_name, folder=folder, reference=str(folder.resolve())
    )


def require_fit(components: Sequence[Component], model: ModelConfig) -> None:
    """Compare the parts that lie in folders with the model, and with each other.

    Hub repositories are not looked into.

    Raises:
        ConfigError: a part is of another width; names it, both values, and what they belong to.
    """
    found = {component.name: component.folder for component in components if component.folder is not None}
    if (vae := found.get("vae")) is not None:
        settings = read_model_config(vae, "VAE")
        strides = settings.get("temperal_downsample", _VAE_DEFAULTS["temperal_downsample"])
        _require_equal(vae, "z_dim", settings.get("z_dim", _VAE_DEFAULTS["z_dim"]), "latent_channels",
                       model.latent_channels)  # fmt: skip
        if "mask_channels" in paradigm_of(model).config_fields:
            _require_equal(vae, "temporal stride", 2 ** sum(map(bool, strides)), "mask_channels", model.mask_channels)
    if any(component.name == _IMAGE_ENCODER for component in components) and not paradigm_of(model).image_rows(model):
        raise ConfigError(
            f"--image-encoder: the model ({model.conditioning}) attends to no rows of one; leave out the flag"
        )
    if (encoder := found.get(_IMAGE_ENCODER)) is not None:
        settings = read_model_config(encoder, "image encoder")
        rows = 1 + (settings.get("image_size", 0) // settings.get("patch_size", 1)) ** 2
        _require_equal(encoder, "hidden_size", settings.get("hidden_size"), "image_dim", model.image_dim)
        _require_equal(encoder, "number of rows", rows, "image_rows", model.image_rows)
    if (encoder := found.get("text_encoder")) is not None:
        settings = read_model_config(encoder, "text encoder")
        _require_equal(encoder, "d_model", settings.get("d_model"), "text_dim", model.text_dim)
        if (tokenizer := found.get("tokenizer")) is not None:
            highest, rows = _highest_token(tokenizer), settings.get("vocab_size")
            if isinstance(rows, int) and highest >= rows:
                raise ConfigError(
                    f"{tokenizer} gives tokens up to {highest}, but {encoder} knows {rows}; give the tokenizer of this "
                    "text encoder"
                )


# diffusers' own, for keys that a configuration leaves out.
_VAE_DEFAULTS: Mapping[str, Any] = {"z_dim": 16, "temperal_downsample": (False, True, True)}


def _require_equal(folder: Path, name: str, found: object, field: str, wanted: int) -> None:
    if found != wanted:
        raise ConfigError(
            f"{folder} does not fit the model: its {name} is {found}, the model's {field} {wanted}; give the part that "
            "the model was trained with"
        )


def _highest_token(folder: Path) -> int:
    from transformers import AutoTokenizer

    return max(AutoTokenizer.from_pretrained(str(folder), local_files_only=True).get_vocab().values(), default=-1)


def _look_at_vae(folder: Path) -> tuple[str, str]:
    name = read_model_config(folder, "VAE").get("_class_name")
    if name != "AutoencoderKLWan":
        raise ConfigError(f"VAE folder {folder}: config.json names the class {name!r}; it must be AutoencoderKLWan")
    require_files(folder, "VAE", "*.safetensors")
    return "diffusers", "AutoencoderKLWan"


def _look_at_text_encoder(folder: Path) -> tuple[str, str]:
    kind = read_model_config(folder, "text encoder").get("model_type")
    if kind != "umt5":
        raise ConfigError(f"text encoder folder {folder}: config.json's model_type is {kind!r}; it must be umt5")
    require_files(folder, "text encoder", "*.safetensors")
    return "transformers", "UMT5EncoderModel"


def _look_at_tokenizer(folder: Path) -> tuple[str, str]:
    require_files(folder, "tokenizer", "tokenizer*")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"tokenizer folder {folder}: cannot be loaded ({error})") from error
    name = type(tokenizer).__name__
    # transformers 5 has another name for the class, which version 4 does not know; both know the old one.
    return "transformers", "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name


def _look_at_image_encoder(folder: Path) -> tuple[str, str]:
    kind = read_model_config(folder, "image encoder").get("model_type")
    if kind != "clip_vision_model":
        raise ConfigError(
            f"image encoder folder {folder}: config.json's model_type is {kind!r}; it must be clip_vision_model"
        )
    require_files(folder, "image encoder", "*.safetensors")
    return "transformers", "CLIPVisionModel"


_LOOK = {
    "vae": _look_at_vae, "text_encoder": _look_at_text_encoder, "tokenizer": _look_at_tokenizer,
    _IMAGE_ENCODER: _look_at_image_encoder, PROCESSOR_FOLDER: lambda folder: _PROCESSOR_CLASS,
}  # fmt: skip


def load_references(
    pipeline: Any, path: str | os.PathLike[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Add to ``options`` the components that a release names elsewhere, loaded; keep those that are given already.

    Args:
        pipeline: the class, whose ``load_config`` finds ``model_index.json``.
        path: folder or repository of the release.
        options: of ``from_pretrained``.
    """
    index = Path(path) / "model_index.json"
    if index.is_file():
        config = read_json_object(index, error=ConfigError)
    else:
        places = ("revision", "cache_dir", "local_files_only", "token", "force_download", "proxies")
        config = pipeline.load_config(path, **{key: options[key] for key in places if key in options})
    loaded = dict(options)
    for name, reference in config.get(REFERENCES, {}).items():
        if name in _LOOK and name not in loaded:
            loaded[name] = _load(name, reference, options)
    return loaded


def _load(name: str, reference: str, options: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

    logger.info("loading %s from %s", name, reference)
    place, _, subfolder = (reference, "", "") if Path(reference).is_absolute() else reference.partition(":")
    where: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    dtype = options.get("dtype", options.get("torch_dtype"))
    if name == "tokenizer":
        return AutoTokenizer.from_pretrained(place, **where)
    if name == PROCESSOR_FOLDER:
        return CLIPImageProcessor.from_pretrained(place, **where)
    if name == _IMAGE_ENCODER:
        return CLIPVisionModel.from_pretrained(place, use_safetensors=True, dtype=dtype, **where)
    if name == "vae":
        return AutoencoderKLWan.from_pretrained(place, use_safetensors=True, torch_dtype=dtype, **where)
    return UMT5EncoderModel.from_pretrained(place, use_safetensors=True, dtype=dtype, **where)
