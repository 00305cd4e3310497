"""The checkpoint that a run goes on from, and what its ``state.json`` says besides the trained state."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_flashi2v.checkpoint.folders import STATE_NAME, load_model_config, load_state, require_same_model
from megatron_flashi2v.conditioning.build import paradigm_fields, paradigm_of
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.train import BatchArguments, CheckpointArguments, ParallelArguments, TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.parallel.agreement import share_json
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.runtime.provenance import source_commit
from megatron_flashi2v.version import __version__

SETTINGS_OF_A_START = frozenset({
    *(field.name for field in dataclasses.fields(CheckpointArguments)), "dry_run", "world_size", "log_interval",
    "load_adapter",
})
"""Flags of one start of a run, which a resumed run may change without a word; checkpoints do not record them."""

CONFIG_FILE = "config.yaml"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """With what seed, data, layout and code a run is trained.

    Attributes:
        seed: keys every draw.
        data_name: of the data, for messages.
        data: count, fingerprint and sizes of the samples.
        layout: see :func:`layout_of`.
        config: the flags by their names, without :data:`SETTINGS_OF_A_START`.
        started_from: folder that ``--load`` named when the run began; None for one that began anew.
        overrides_schedule: whether the run may change the schedule that it resumes.
        commit: of the source, where it is known; rank 0's.
    """

    seed: int
    data_name: str
    data: dict[str, Any]
    layout: dict[str, Any]
    config: dict[str, Any]
    started_from: str | None
    overrides_schedule: bool
    commit: str | None

    def to_json(self) -> dict[str, Any]:
        """Entries of state.json."""
        return {
            "version": __version__, "seed": self.seed, "data": self.data, "layout": self.layout, "config": self.config,
            "started_from": self.started_from, "commit": self.commit,
        }


def provenance_of(
    config: TrainConfig, data: Blend, launch: LaunchEnvironment, *, started_from: str | None
) -> Provenance:
    """The provenance of the run that these flags make of these data."""
    info = data.info
    return Provenance(
        seed=config.batch.seed,
        data_name=data.name,
        data={"samples": len(data), "fingerprint": data.fingerprint, "frames": info.frames, "height": info.height,
              "width": info.width, "fps": info.fps, "interpolation": info.interpolation},
        layout=layout_of(config.batch, config.parallel, launch.world_size),
        config={name: value for name, value in flat_values(config).items() if name not in SETTINGS_OF_A_START},
        started_from=started_from,
        overrides_schedule=config.checkpoint.override_opt_param_scheduler,
        commit=source_commit() if launch.rank == 0 else None,
    )


def require_model_of(folder: Path, model: ModelConfig) -> None:
    """Refuse to go on from a checkpoint of another model.

    Fields that the paradigm does not read may differ. Converted weights, at iteration 0, have seen no captions: the
    run's data decide how those are cleaned.

    Args:
        folder: the checkpoint.
        model: the run's, as the data fit it.

    Raises:
        CheckpointError: lists every field that differs, with both values.
    """
    stored = load_model_config(folder)
    unread = {*paradigm_fields()} - {*paradigm_of(model).config_fields}
    stored = dataclasses.replace(stored, **{field: getattr(model, field) for field in unread})
    if not load_training_state(folder)["iteration"]:
        stored = dataclasses.replace(stored, text_cleaning=model.text_cleaning)
    require_same_model(stored, model, folder)


def settle_changes(folder: Path, state: dict[str, Any], now: Provenance) -> None:
    """List once what a run changes in the one that it resumes; refuse to bend the schedule under way unasked.

    Collective where the checkpoint is of version 0.1.

    Args:
        folder: the checkpoint.
        state: its :func:`load_training_state`.
        now: of the run that resumes.

    Raises:
        ConfigError: the schedule of learning rate, weight decay or batch differs, without
            ``--override-opt-param-scheduler``.
    """
    if not state["iteration"]:  # converted weights know no run
        return
    # The first rank's reading: it writes the file anew as soon as it has loaded, perhaps before another rank reads it.
    before = state.get("config") or share_json(_config_beside(folder))
    changed = {
        name: (before[name], value) for name, value in now.config.items()
        if name in before and before[name] != value
    }
    if changed:
        logger.warning("settings that differ from those of %s:\n%s", folder, _table(changed), extra=AGREED)
    bent = [name for name in changed if name in _schedule_fields(before, now.config)]
    if bent and not now.overrides_schedule:
        flags = ", ".join(
            f"--{name.replace('_', '-')} is {changed[name][1]} and was {changed[name][0]}" for name in bent
        )
        raise ConfigError(
            f"{flags} in {folder}, which changes the schedule under way; give the old values, or "
            "--override-opt-param-scheduler to go on with the new ones"
        )
    if state["seed"] != now.seed:
        logger.warning("--seed is %d, but %s was trained with %d: draws and the order of samples change", now.seed,
                       folder, state["seed"], extra=AGREED)
    if state["data"]["fingerprint"] != now.data["fingerprint"]:
        logger.warning("%s was trained on other data than %s", folder, now.data_name, extra=AGREED)


def _config_beside(folder: Path) -> dict[str, Any]:
    """Flags of a checkpoint of version 0.1, which kept them in its run's config.yaml alone; none where that is gone."""
    try:
        stored = yaml.safe_load((folder.parent / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    # YAML knows values that JSON does not, such as dates.
    return json.loads(json.dumps(stored, default=str)) if isinstance(stored, dict) else {}


def _schedule_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Flags that decide how learning rate, weight decay and batch go on."""
    fields = {"lr", "lr_decay_style", "lr_warmup_iters", "weight_decay", "weight_decay_rules", "global_batch_size"}
    if {before.get("lr_decay_style"), now["lr_decay_style"]} != {"constant"}:
        fields |= {"min_lr", "lr_decay_iters"}
        if before.get("lr_decay_iters") is None or now["lr_decay_iters"] is None:
            fields.add("train_iters")  # the decay's length by default
    return fields


def _table(changed: Mapping[str, tuple[Any, Any]]) -> str:
    rows = [("setting", "there", "here"), *((name, str(old), str(new)) for name, (old, new) in changed.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}" for name, old, new in rows)


def layout_of(batch: BatchArguments, parallel: ParallelArguments, world_size: int) -> dict[str, Any]:
    """Layout of the model and the batch, and their precision, for the record."""
    return {
        "processes": world_size,
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "global_batch_size": batch.global_batch_size,
        "precision": "bf16" if batch.bf16 else "fp32",
    }


def load_training_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``; one of converted weights, at iteration 0, knows no run.

    Raises:
        CheckpointError: it is missing, malformed or lacks an entry.
    """
    state = load_state(folder)
    names = ["iteration", "consumed_samples", *(("seed", "data", "optimizer") if state.get("iteration") else ())]
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(
            f"{folder / STATE_NAME} has no {', '.join(missing)}; the checkpoint is damaged, load another one"
        )
    return state
