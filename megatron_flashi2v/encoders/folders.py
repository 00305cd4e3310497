"""Checks on the folders that diffusers and transformers models are read from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.files import read_json_object

_WAN_FILES = ("Wan*_VAE.pth", "models_t5_*.pth", "models_clip_*.pth")
_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<subfolder>\w[\w./-]*)")
_OWNER_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FETCHED_ENDINGS = (".json", ".safetensors", ".model", ".txt")
"""Configurations, vocabularies and weights; never a pickle."""


def model_folder(place: Path, what: str) -> Path:
    """The folder of a frozen model: one given as it is, inside a release, or on the Hub.

    Args:
        place: a folder, a release's folder with the model in its usual subfolder, or ``OWNER/NAME:SUBFOLDER`` of a Hub
            repository, whose files are fetched into the Hub's cache, or found there.
        what: it should hold: "VAE", "text encoder", "tokenizer" or "image encoder".

    Raises:
        ConfigError: the Hub cannot be reached and its cache does not hold the files.
    """
    part = place / what.lower().replace(" ", "_")
    if place.is_dir():
        # A release holds model_index.json; its folders are named after its parts.
        own = any(path.is_file() for path in place.glob("tokenizer*" if what == "tokenizer" else "config.json"))
        return part if part.is_dir() and not own else place
    match = _REPOSITORY.fullmatch(str(place))
    return place if match is None else _fetched(match["repository"], match["subfolder"], what)


def _fetched(repository: str, subfolder: str, what: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        patterns = [f"{subfolder}/*{ending}" for ending in _FETCHED_ENDINGS]
        if what == "image encoder":  # whose processor lies beside it in diffusers' layout
            patterns.append("image_processor/*.json")
        root = snapshot_download(repository, allow_patterns=patterns)
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{what} {repository}:{subfolder}: there is no such folder, the Hugging Face Hub's cache does not hold it, "
            "and the Hub cannot be asked (HF_HUB_OFFLINE, or no connection); fetch it elsewhere and give the folder"
        ) from error
    except Exception as error:  # of the Hub's client, and of the HTTP library under it, which differs by version
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{what} {repository}:{subfolder}: there is no such folder, and the Hugging Face Hub cannot be asked "
            f"({type(error).__name__}: {reason}); fetch it elsewhere and give the folder"
        ) from error
    return Path(root, subfolder)


def require_files(folder: Path, what: str, *names: str) -> None:
    """Refuse a folder that does not hold a model.

    Args:
        folder: as given by the user.
        what: what it should hold, such as "VAE".
        names: files, each of which must be there; a name with a ``*`` needs one match.

    Raises:
        ConfigError: the folder or a file is missing.
    """
    if not folder.is_dir():
        fault = "is a file" if folder.is_file() else "does not exist"
        hint = _made_by(folder.parent) if folder.suffix == ".pth" else ""
        if _OWNER_NAME.fullmatch(str(folder)) and not folder.parent.exists():
            hint = f"; a part of a Hub repository is given as {folder}:SUBFOLDER"
        rule = f"; it must hold {', '.join(names)}" if names else ""
        raise ConfigError(f"{what} folder {folder} {fault}{rule}{hint}")
    for name in names:
        if not any(folder.glob(name)):
            inside = sorted(child.name for child in folder.iterdir() if child.is_dir() and any(child.glob(name)))
            hint = f"; did you mean its subfolder {' or '.join(inside)}?" if inside else _made_by(folder)
            raise ConfigError(f"{what} folder {folder}: no {name} in it{hint}")


def _made_by(folder: Path) -> str:
    """For a message: how folders are made of encoders as Wan released them; empty if there are none."""
    if not any(any(folder.glob(name)) for name in _WAN_FILES):
        return ""
    return f"; make folders of Wan's own files: flashi2v convert --from wan {folder} --to encoders OUT"


def read_model_config(folder: Path, what: str) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    require_files(folder, what, "config.json")
    return read_json_object(folder / "config.json", error=ConfigError)


def require_all_weights(folder: Path, what: str, missing: list[str]) -> None:
    """Refuse a model with weights that its files did not give (they would be random).

    Raises:
        ConfigError: names of missing weights were given.
    """
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise ConfigError(f"{what} folder {folder}: {len(missing)} weights are missing from its files, such as {shown}")
