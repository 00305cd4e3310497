"""Opens the tensors at a path, whatever holds them: a file, shards with or without their index, a trainer's folder.

Of a folder with several files it takes the set that is the model: it passes over the files of Wan's encoders, prefers
safetensors to pickled files and full precision to a variant, and asks where the choice is not clear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.sources import (
    SourceTensor,
    is_index,
    open_safetensors,
    open_sharded,
)
from megatron_flashi2v.conversion.torch_archive import is_torch_archive, open_torch_archive
from megatron_flashi2v.conversion.torch_distributed_checkpoint import METADATA_NAME, open_distributed
from megatron_flashi2v.conversion.training_folders import find_training_file, newest_iteration

ENCODER_FILE = re.compile(r"(Wan[\d.]+_VAE|models_(t5|clip)_.*)\.(pth|pt|safetensors)")
"""Names of the files of Wan's VAE, text encoder and image encoder, which lie beside its transformer."""
EXPERTS = ("high_noise_model", "low_noise_model")
"""Folders of Wan2.2's two transformers."""

_ENDINGS = ("safetensors", "bin", "pt", "pth", "ckpt")
# The precisions that file names tell, best first; full precision has none.
_VARIANTS = ("", "fp32", "bf16", "fp16")
_VARIANT = r"(?:\.(?P<{}>fp32|bf16|fp16))?"
_FILE = re.compile(
    rf"(?P<stem>.+?){_VARIANT.format('first')}(?:-(?P<number>\d{{5}})-of-(?P<count>\d{{5}}))?"
    rf"{_VARIANT.format('second')}\.(?P<ending>{'|'.join(_ENDINGS)})"
)
_INDEX = re.compile(
    rf"(?P<stem>.+?){_VARIANT.format('first')}\.(?P<ending>safetensors|bin)\.index{_VARIANT.format('second')}\.json"
)


@dataclass(frozen=True, kw_only=True)
class Container:
    """What was opened.

    Attributes:
        tensors: by their names in the files.
        others: names of entries that are no tensors.
        notes: choices made among several files.
    """

    tensors: Mapping[str, SourceTensor]
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Set(NamedTuple):
    """Files that together hold one set of weights."""

    stem: str
    variant: str
    ending: str

    @property
    def label(self) -> str:
        return ".".join(part for part in self if part)


def open_container(path: Path, weights: str = "model") -> Container:
    """Open all tensors at a path.

    Args:
        path: a file of weights, an index of shards, or a folder.
        weights: ``model`` or ``ema``, where a trainer's folder has a file for each.

    Raises:
        CheckpointError: there are none, it is unclear which are meant, or a file is damaged or of no known kind.
    """
    if path.is_file():
        return open_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a file or a folder of weights")
    folder = newest_iteration(path)
    notes = () if folder == path else (f"took {folder.name}, the newest of its iterations",)
    if (folder / METADATA_NAME).is_file():
        opened = open_file(folder / METADATA_NAME)
    elif (file := find_training_file(folder, weights)) is not None:
        opened = open_file(file)
    else:
        opened = _open_set(folder)
    return Container(tensors=opened.tensors, others=opened.others, notes=(*notes, *opened.notes))


def open_file(path: Path) -> Container:
    """Open all tensors of one file, or of the shards that an index names.

    Raises:
        CheckpointError: the file is damaged, or of no known kind.
    """
    if is_index(path):
        return Container(tensors=open_sharded(path, _open_shard))
    if path.name == METADATA_NAME:
        tensors, others = open_distributed(path.parent)
        return Container(tensors=tensors, others=others)
    if is_torch_archive(path):
        tensors, others = open_torch_archive(path)
        return Container(tensors=tensors, others=others)
    if path.suffix in (".safetensors", ".sft"):
        return Container(tensors=open_safetensors(path))
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{path} is a GGUF file, whose quantised weights cannot be read; give the bf16 or fp16 safetensors that it "
            "was made from"
        )
    raise CheckpointError(f"{path} is no file of weights; give a .safetensors, .pt or .pth file, or an index of shards")


def _open_shard(path: Path) -> Mapping[str, SourceTensor]:
    if is_index(path):
        raise CheckpointError(f"{path} is an index, but another index names it as a shard")
    return open_file(path).tensors


def _open_set(folder: Path) -> Container:
    """Open the one set of weights in a folder."""
    indices: dict[_Set, Path] = {}
    files: dict[_Set, dict[tuple[int, int], Path]] = {}
    passed = []
    for path in sorted(folder.iterdir()):
        if ENCODER_FILE.fullmatch(path.name):
            passed.append(path.name)
        elif match := _INDEX.fullmatch(path.name):
            indices[_set_of(match)] = path
        elif match := _FILE.fullmatch(path.name):
            place = (int(match["number"] or 1), int(match["count"] or 1))
            files.setdefault(_set_of(match), {})[place] = path
    chosen = _choose(folder, list(dict.fromkeys((*indices, *files))), passed)
    others = sorted(found.label for found in {*indices, *files} - {chosen})
    notes = [f"took {chosen.label} and left {', '.join(others)}"] if others else []
    if chosen in indices:
        opened = open_file(indices[chosen])
        return Container(tensors=opened.tensors, notes=(*notes, *opened.notes))
    parts = files[chosen]
    counts = {count for _, count in parts}
    if len(counts) > 1 or set(parts) != {(number, max(counts)) for number in range(1, max(counts) + 1)}:
        held = ", ".join(path.name for path in parts.values())
        raise CheckpointError(f"{folder} has no index of its shards, and not all of them: {held}; use another copy")
    if counts != {1}:
        notes.append(f"read {len(parts)} shards without their index")
    return _merge(folder, [open_file(path) for _, path in sorted(parts.items())], notes)


def _set_of(match: re.Match[str]) -> _Set:
    return _Set(match["stem"], match["first"] or match["second"] or "", match["ending"])


def _merge(folder: Path, opened: Sequence[Container], notes: Sequence[str]) -> Container:
    tensors: dict[str, SourceTensor] = {}
    for part in opened:
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            name = min(twice)
            places = f"{tensors[name].path.name} and {part.tensors[name].path.name}"
            raise CheckpointError(f"{folder}: tensor {name} is in {places}; name the file to read")
        tensors |= part.tensors
    return Container(
        tensors=tensors,
        others=tuple(name for part in opened for name in part.others),
        notes=(*notes, *(note for part in opened for note in part.notes)),
    )


def _choose(folder: Path, sets: Sequence[_Set], passed: Sequence[str]) -> _Set:
    """The best of several sets that differ in precision and kind of file alone."""
    if not sets:
        raise CheckpointError(_nothing(folder, passed))
    if len({found.stem for found in sets}) > 1:
        listed = ", ".join(sorted(found.label for found in sets)[:5])
        raise CheckpointError(f"{folder} holds {listed}; name the file to read")
    return min(sets, key=lambda found: (_ENDINGS.index(found.ending) > 0, _VARIANTS.index(found.variant), found.ending))


def _nothing(folder: Path, passed: Sequence[str]) -> str:
    """Message on a folder without a model, with the next step."""
    inside = sorted(
        child.name for child in folder.iterdir()
        if child.is_dir() and any(_FILE.fullmatch(path.name) for path in child.iterdir())
    )  # fmt: skip
    hint = f"; did you mean its subfolder {' or '.join(inside[:3])}?" if inside else ""
    if passed:
        return (
            f"{folder} holds files of Wan's encoders alone ({', '.join(passed)}), and no transformer"
            + (hint or "; give the folder of the transformer's weights")
        )
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files alone, whose quantised weights cannot be read; give bf16 or fp16 safetensors"
    return f"{folder} holds no .safetensors, .bin, .pt or .pth file and no {METADATA_NAME}{hint}"
