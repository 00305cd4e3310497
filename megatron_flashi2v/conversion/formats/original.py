"""The formats under original names: ``wan``, ``flashi2v-npu`` and ``flashi2v-gpu``.

They differ in the key table's column and in phi's order. Reads what :mod:`containers` opens; writes safetensors, which
Wan's and both FlashI2V code bases read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.key_table import conditioning_mappings, mappings
from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.containers import EXPERTS, open_container
from megatron_flashi2v.conversion.formats.original_config import MODEL_CONFIG_NAME, read_config, wan_config
from megatron_flashi2v.conversion.quantised import dequantised
from megatron_flashi2v.conversion.recognition import require_model
from megatron_flashi2v.conversion.sources import SourceTensor
from megatron_flashi2v.conversion.training_folders import EMA
from megatron_flashi2v.conversion.weights import (
    ExternalWeights,
    OnBytes,
    ReadOptions,
    Weights,
    external_groups,
    write_hub_folder,
)
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object

STEM = "diffusion_pytorch_model"
CONFIG_NAME = "config.json"
INTERPOLATION = "_interpolation"
"""Key of :data:`CONFIG_NAME` in our exports; diffusers' readers, which Wan's code has, ignore keys that begin so."""

# Every model has this tensor under the same name in every column; what precedes the name is the state's prefix.
_MARK = "patch_embedding.weight"
# Prefixes that training code gives the state of a model; the reference tries them in this order, after the EMA weights.
_MODEL_PREFIXES = ("", "model.", "state_dict.", "module.", "model.module.")


@dataclass(frozen=True, kw_only=True)
class OriginalFormat:
    """One of the formats.

    Attributes:
        name: as on the command line.
        column: of the key table.
        phi_order: order in which the format's own code computes phi; None if it has no phi.
        interpolation: with which the format's own code resizes pictures, where that is not ours.
    """

    name: str
    column: str
    phi_order: str | None
    interpolation: str | None = None

    def open(self, path: Path, options: ReadOptions) -> Weights:
        """Open the weights in a file or a folder.

        Raises:
            CheckpointError: there are no weights, a file is damaged, or it needs more than the restricted loader gives.
            ConfigError: the files do not determine the model; the error names the flag that is needed.
        """
        held = open_container(path, options.weights)
        require_model(path, held.tensors)
        chosen, left_out, ema_only = _select(path, held.tensors, options.weights)
        tensors, scales = dequantised(path, chosen)
        notes = ["the source holds EMA weights only; took these"] if ema_only else []
        config, assumed = read_config(path, tensors, self.column, self.phi_order, options)
        entries = list(mappings(config, self.column))
        weights = ExternalWeights(path, config, entries, tensors, options)
        weights.left_out = (*left_out, *held.others, *scales)
        folder = path if path.is_dir() else path.parent
        weights.notes = (*_expert_note(folder), *held.notes, *notes, *assumed)
        interpolation = self._interpolation(folder)
        if interpolation is not None:
            weights.facts = {"data": {"interpolation": interpolation}}
        return weights

    def _interpolation(self, folder: Path) -> Any:
        """How the model's pictures are resized: as our export records it, else as the format's own code does."""
        if not (folder / MODEL_CONFIG_NAME).is_file():
            return self.interpolation
        stated = folder / CONFIG_NAME
        return read_json_object(stated, error=CheckpointError).get(INTERPOLATION) if stated.is_file() else None

    def write(self, folder: Path, weights: Weights, max_bytes: int, on_bytes: OnBytes | None) -> None:
        """Write safetensors, Wan's ``config.json``, and ``model_config.json``, which describes the whole model."""
        groups = external_groups(weights, list(mappings(weights.config, self.column)))
        write_hub_folder(folder, STEM, groups, max_bytes, on_bytes)
        data = weights.facts.get("data") or {}
        recorded = {INTERPOLATION: data["interpolation"]} if "interpolation" in data else {}
        atomic_write_json(folder / CONFIG_NAME, {**wan_config(weights.config), **recorded})
        atomic_write_json(folder / MODEL_CONFIG_NAME, weights.config.to_json())

    def is_ours(self, folder: Path) -> bool:
        """Whether a folder holds what :meth:`write` writes and nothing else."""
        names = {path.name for path in folder.iterdir()}
        rest = {name for name in names if not re.fullmatch(rf"{STEM}[\w-]*\.safetensors(\.index\.json)?", name)}
        return rest == {CONFIG_NAME, MODEL_CONFIG_NAME} and rest != names

    def names(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """External names of each of our tensors."""
        return {entry.ours: entry.external for entry in mappings(config, self.column)}

    def caveats(self, config: ModelConfig) -> tuple[str, ...]:
        """What the format's own code computes otherwise than this model."""
        paradigm = paradigm_of(config)
        own = [name for entry in conditioning_mappings(config, self.column) for name in entry.external]
        if self.phi_order is None and own:
            return (
                f"Wan's own code has no place for {len(own)} tensors ({', '.join(own[:2])}, ...): it drops them and "
                "runs the rest as text-to-video; only readers of model_config.json run the model",
            )
        if paradigm.wan_model_type == "i2v" and self.phi_order is None and not paradigm.image_rows(config):
            return (
                f"{CONFIG_NAME} says model_type i2v, which in Wan2.1's code has a branch for CLIP's rows that this "
                "model has not; Wan2.2's I2V code runs it",
            )
        matters = "phi_order" in paradigm.meaningful_fields(config)
        if not matters or self.phi_order in (None, config.phi_order):
            return ()
        return (
            f"{self.name}'s own code computes phi as {self.phi_order}; this model's phi is {config.phi_order} over a "
            f"kernel that spans time, so only readers of {MODEL_CONFIG_NAME} run it right",
        )


WAN = OriginalFormat(name="wan", column="wan", phi_order=None)
FLASHI2V_NPU = OriginalFormat(name="flashi2v-npu", column="flashi2v_npu", phi_order="repeat_then_conv",
                              interpolation="bilinear")  # fmt: skip
FLASHI2V_GPU = OriginalFormat(name="flashi2v-gpu", column="wan", phi_order="conv_then_broadcast")


def _expert_note(folder: Path) -> tuple[str, ...]:
    """A note on one of two experts by the name of its folder; nothing in it tells the noise level that divides them."""
    name = folder.resolve().name
    if name not in EXPERTS:
        return ()
    (other,) = set(EXPERTS) - {name}
    side = "of at least" if name == EXPERTS[0] else "below"
    return (
        f"one of two experts, for timesteps {side} boundary_ratio x 1000 (0.9 in Wan2.2's image to video, 0.875 in its "
        f"text to video); {other} is another model",
    )


def _select(
    path: Path, held: Mapping[str, SourceTensor], weights: str
) -> tuple[dict[str, SourceTensor], tuple[str, ...], bool]:
    """Select a set of weights: its tensors without their prefix, the names left out, whether the source is EMA only."""
    prefixes = [name.removesuffix(_MARK) for name in held if name == _MARK or name.endswith(f".{_MARK}")]
    if not prefixes:
        raise CheckpointError(f"{path} holds no tensor {_MARK}, but {len(held)} others: another format or model")
    ema = [prefix for prefix in prefixes if prefix.startswith(EMA)]
    file = held[prefixes[0] + _MARK].path
    if file.name.startswith(EMA) or file.suffix == f".{EMA}":
        ema = prefixes  # main and MindSpeed mark EMA weights by the file's name
    plain = [prefix for prefix in prefixes if prefix not in ema]
    if weights == EMA and not ema:
        raise CheckpointError(f"{path} holds no EMA weights; leave out --weights ema")
    candidates = ema if weights == EMA or not plain else plain
    prefix = next((prefix for prefix in _MODEL_PREFIXES if prefix in candidates), candidates[0])
    if prefix not in _MODEL_PREFIXES and len(candidates) > 1:
        several = ", ".join(candidates)
        raise CheckpointError(f"{path} holds several models, under {several}; save the one to read in its own file")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in held.items() if name.startswith(prefix)}
    # megatron's linears add an entry each that is empty or holds a few bytes.
    extra = [name for name in tensors if name.endswith("_extra_state")]
    for name in extra:
        del tensors[name]
    left_out = [name for name in held if not name.startswith(prefix)] + [prefix + name for name in extra]
    return tensors, tuple(left_out), weights != EMA and not plain
