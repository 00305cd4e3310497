"""Checks on the folders that diffusers and transformers models are read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.files import read_json_object


def component_folder(folder: Path | str, name: str) -> Path:
    """The folder of a model: the one given, or the subfolder ``name`` of the diffusers pipeline that was given."""
    folder = Path(folder)
    return folder / name if (folder / "model_index.json").is_file() else folder


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
        raise ConfigError(f"{what} folder {folder} does not exist; it must hold {', '.join(names)}")
    for name in names:
        if not any(folder.glob(name)):
            inside = sorted(child.name for child in folder.iterdir() if child.is_dir() and any(child.glob(name)))
            hint = f"; did you mean its subfolder {' or '.join(inside)}?" if inside else ""
            raise ConfigError(f"{what} folder {folder}: no {name} in it{hint}")


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
