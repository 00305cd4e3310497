"""The format ``diffusers``: a folder whose ``transformer/`` is diffusers' ``WanTransformer3DModel``.

The sibling ``image_conditioning/`` holds what diffusers' model has no place for: FlashI2V's own tensors, under the
names of FlashI2V's main branch, and the settings that no shape tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.key_table import Mapped, mappings
from megatron_flashi2v.conditioning.build import (
    input_channels,
    paradigm_of,
    read_model_config,
    recognise,
    recognition_rules,
)
from megatron_flashi2v.conditioning.interface import ForeignModel
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import DEFAULT_SHIFT
from megatron_flashi2v.conversion.containers import open_container
from megatron_flashi2v.conversion.experts import range_record, trained_range
from megatron_flashi2v.conversion.quantised import dequantised
from megatron_flashi2v.conversion.recognition import (
    FIRST_AND_LAST,
    SECOND_TRANSFORMER,
    TRANSFORMER,
    channels_named,
    require_model,
)
from megatron_flashi2v.conversion.weights import (
    FOREIGN_TEXT_CLEANING,
    NEGATIVE_PROMPT,
    ExternalWeights,
    OnBytes,
    ReadOptions,
    Weights,
    external_groups,
    write_hub_folder,
)
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object

CONDITIONING, SCHEDULER = "image_conditioning", "scheduler"
SECOND_CONDITIONING = "image_conditioning_2"
PIPELINE_NAME = "model_index.json"
BOUNDARY = "boundary_ratio"
"""Key of ``model_index.json``, diffusers' own: the noise level that divides a pair of experts."""
WEIGHTS_STEM = "diffusion_pytorch_model"
PIPELINE_DEFAULTS = {"num_frames": "frames", "height": "height", "width": "width", "fps": "fps",
                     "interpolation": "interpolation"}  # fmt: skip
"""Keys of the training data's description in a checkpoint, by the pipeline's argument."""
REFERENCES = "_component_sources"
"""Key of ``model_index.json`` for components that lie elsewhere; diffusers ignores keys that begin with ``_``."""
RELEASE_PARTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor", "README.md")
"""Further entries of a release's folder."""
TRANSFORMER_CLASS, CONDITIONING_CLASS = "WanTransformer3DModel", "FlashI2VImageConditioning"
SCHEDULER_CLASS = "DPMSolverMultistepScheduler"

SCHEDULER_SETTINGS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": DEFAULT_SHIFT,
    "solver_order": 1,
}
"""FlashI2V's sampler for diffusers' own pipelines: at first order, DPM-Solver++ takes Euler's steps in sigma.

diffusers' flow-matching Euler scheduler shifts its last sigma twice and has no flow_shift, so that its grid is another.
"""

TRAINED_SIGMAS = "_trained_sigmas"
"""Key of an expert's ``config.json``: the lowest and highest sigma of its training. diffusers passes over names like
this."""

# The options of diffusers' class that describe our model.
_FIXED: Mapping[str, Any] = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}


def transformer_config(config: ModelConfig) -> dict[str, Any]:
    """Content of ``transformer/config.json``."""
    has_image_rows = paradigm_of(config).image_rows(config) > 0
    return {
        "_class_name": TRANSFORMER_CLASS,
        "_diffusers_version": metadata.version("diffusers"),
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": input_channels(config),
        "out_channels": config.latent_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_hidden_size,
        "num_layers": config.num_layers,
        "eps": config.norm_eps,
        "image_dim": config.image_dim if has_image_rows else None,
        "added_kv_proj_dim": config.hidden_size if has_image_rows else None,
        **_FIXED,
    }


def _trained_sigmas(transformer: Path) -> dict[str, Any]:
    """The noise levels that an expert was trained on, as a run's state records them; empty of a whole model."""
    stored = read_json_object(transformer / "config.json", error=CheckpointError).get(TRAINED_SIGMAS)
    if not (isinstance(stored, list) and len(stored) == 2 and all(isinstance(one, int | float) for one in stored)):
        return {}
    return {"config": dict(zip(("sigma_min", "sigma_max"), stored, strict=True))}


def write_weights(folder: Path, weights: Weights, max_bytes: int, on_bytes: OnBytes | None) -> None:
    """Fill a folder with the model."""
    config = weights.config
    inside, beside = table(config)
    for name in (TRANSFORMER, CONDITIONING):
        (folder / name).mkdir()
    write_hub_folder(folder / TRANSFORMER, WEIGHTS_STEM, external_groups(weights, inside), max_bytes, on_bytes)
    expert = {TRAINED_SIGMAS: trained_range(weights.facts)} if range_record(weights.facts) else {}
    atomic_write_json(folder / TRANSFORMER / "config.json", {**transformer_config(config), **expert})
    if beside:
        write_hub_folder(
            folder / CONDITIONING, WEIGHTS_STEM, external_groups(weights, beside), max_bytes, on_bytes
        )
    atomic_write_json(
        folder / CONDITIONING / "config.json", {"_class_name": CONDITIONING_CLASS, **config.to_json()}
    )
    version = metadata.version("diffusers")
    (folder / SCHEDULER).mkdir()
    atomic_write_json(
        folder / SCHEDULER / "scheduler_config.json",
        {"_class_name": SCHEDULER_CLASS, "_diffusers_version": version, **SCHEDULER_SETTINGS},
    )
    atomic_write_json(
        folder / PIPELINE_NAME,
        {
            "_class_name": "FlashI2VPipeline",
            "_diffusers_version": version,
            TRANSFORMER: ["diffusers", TRANSFORMER_CLASS],
            # The module's path, as diffusers writes it for classes of other libraries.
            CONDITIONING: ["megatron_flashi2v.release.image_conditioning", CONDITIONING_CLASS],
            SCHEDULER: ["diffusers", SCHEDULER_CLASS],
        },
    )


def table(config: ModelConfig) -> tuple[list[Mapped], list[Mapped]]:
    """The transformer's tensors, and the others, which diffusers has no place for."""
    inside = list(mappings(config, "diffusers"))
    held = {entry.ours for entry in inside}
    return inside, [entry for entry in mappings(config, "wan") if entry.ours not in held]


def names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """External names of each of our tensors, with their folder."""
    return {
        entry.ours: tuple(f"{folder}/{name}" for name in entry.external)
        for folder, entries in zip((TRANSFORMER, CONDITIONING), table(config), strict=True)
        for entry in entries
    }


def conditioning_of(transformer: Path) -> Path:
    """The folder beside a transformer's with its own settings and tensors; both experts of a pair may share one."""
    second = transformer.parent / SECOND_CONDITIONING
    return second if transformer.name == SECOND_TRANSFORMER and second.is_dir() else transformer.parent / CONDITIONING


def read_config(transformer: Path, conditioning: Path) -> ModelConfig:
    """Read a folder's model from the conditioning's settings, and check it against the transformer's.

    Raises:
        CheckpointError: a file is missing or malformed, the files contradict each other, or hold another kind of model.
    """
    path = transformer / "config.json"
    stored = read_json_object(path, error=CheckpointError)
    if stored.get("_class_name") != TRANSFORMER_CLASS:
        raise CheckpointError(
            f"{path}: _class_name is {stored.get('_class_name')!r}, it must be {TRANSFORMER_CLASS!r}"
        )
    for key, value in _FIXED.items():
        # An absent key has the class's default, which describes our model.
        if key != "rope_max_seq_len" and stored.get(key, value) != value:
            if key == "pos_embed_seq_len":
                raise CheckpointError(f"{path} ({key} is {stored[key]!r}) is {FIRST_AND_LAST}")
            raise CheckpointError(f"{path}: {key} is {stored[key]!r}, this model family has {value!r}")
    beside = conditioning / "config.json"
    if not beside.exists():
        return _from_transformer(path, stored)
    settings = read_json_object(beside, error=CheckpointError)
    try:
        config = read_model_config(
            {key: value for key, value in settings.items() if not key.startswith("_")}, source=str(beside)
        )
    except ConfigError as error:  # it names the file
        raise CheckpointError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{beside}: {error}") from error
    for key, value in transformer_config(config).items():
        # An absent key of the image's rows means that there are none.
        found = stored.get(key, None if key in ("image_dim", "added_kv_proj_dim") else value)
        if not key.startswith("_") and key not in _FIXED and found != value:
            raise CheckpointError(f"{path}: {key} is {found!r}, but {beside} makes it {value!r}")
    return config


def stated_boundary(*places: Path) -> float | None:
    """The noise level that divides a pair of experts, as the first pipeline states it that does.

    Args:
        places: pipelines' folders, or transformers' in them.

    Raises:
        CheckpointError: a file is malformed.
    """
    for folder in (folder for place in places for folder in (place, place.absolute().parent)):
        path = folder / PIPELINE_NAME
        stated = read_json_object(path, error=CheckpointError).get(BOUNDARY) if path.is_file() else None
        if isinstance(stated, int | float):
            return float(stated)
    return None


def recorded_facts(transformer: Path) -> dict[str, Any]:
    """What a release records of a transformer, as a checkpoint's state does: data, negative prompt, an expert's range.

    Raises:
        CheckpointError: a file is malformed.
    """
    pipeline = transformer.parent / PIPELINE_NAME
    index = read_json_object(pipeline, error=CheckpointError) if pipeline.is_file() else {}
    data = {key: index[name] for name, key in PIPELINE_DEFAULTS.items() if index.get(name) is not None}
    negative = index.get(NEGATIVE_PROMPT)
    return {
        **({"data": data} if data else {}),
        **({NEGATIVE_PROMPT: negative} if isinstance(negative, str) else {}),
        **_trained_sigmas(transformer),
    }


def _from_transformer(path: Path, stored: Mapping[str, Any]) -> ModelConfig:
    """The model of a plain transformer folder, whose paradigm its input channels tell; ``path`` is for messages."""
    try:
        return _model_of(stored)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {reason}") from error


def _model_of(stored: Mapping[str, Any]) -> ModelConfig:
    channels = stored["in_channels"]
    latents = stored["out_channels"] or channels  # diffusers reads None as equal to in_channels
    image_dim, added_dim = stored.get("image_dim"), stored.get("added_kv_proj_dim")
    width = stored["num_attention_heads"] * stored["attention_head_dim"]
    if added_dim != (None if image_dim is None else width):
        raise ConfigError(
            f"image_dim is {image_dim} and added_kv_proj_dim {added_dim}: both must be there, the latter as the width "
            f"{width}, or neither"
        )
    paradigm = recognise(
        ForeignModel(latent_channels=latents, input_channels=channels, image_dim=image_dim or 0)
    )
    if image_dim is not None and "image_dim" not in (paradigm or {}):
        raise ConfigError(
            f"image_dim is {image_dim}, in_channels {channels} and out_channels {latents}: a branch for an image's "
            "rows without the input channels of Wan's image-to-video models"
        )
    if paradigm is None:
        known = channels_named(latents, channels) or (
            f"{recognition_rules()}; another paradigm needs the {CONDITIONING}/ folder of its export"
        )
        raise ConfigError(f"in_channels is {channels} and out_channels {latents}: {known}")
    return ModelConfig(
        num_layers=stored["num_layers"],
        hidden_size=width,
        ffn_hidden_size=stored["ffn_dim"],
        num_attention_heads=stored["num_attention_heads"],
        latent_channels=latents,
        patch_size=tuple(stored["patch_size"]),
        text_cleaning=FOREIGN_TEXT_CLEANING,
        freq_dim=stored["freq_dim"],
        text_dim=stored["text_dim"],
        norm_eps=stored["eps"],
        **paradigm,
    )


def open_weights(path: Path, options: ReadOptions) -> Weights:
    """Open the weights of an exported folder, or of a ``WanTransformer3DModel`` folder.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model; or the caller wants EMA weights.
    """
    if options.weights == "ema":
        raise CheckpointError(f"{path}: the format diffusers holds one set of weights; leave out --weights ema")
    transformer = path / TRANSFORMER if (path / TRANSFORMER).is_dir() else path
    notes = _expert_notes(transformer)
    conditioning = conditioning_of(transformer)
    config = read_config(transformer, conditioning)
    options.require_agreement(config, transformer / "config.json")
    inside, beside = table(config)
    opened = open_container(transformer)
    require_model(transformer, opened.tensors)
    tensors, scales = dequantised(transformer, opened.tensors)
    notes += opened.notes
    if beside:
        extra = open_container(conditioning)
        tensors |= extra.tensors
        notes += extra.notes
    weights = ExternalWeights(path, config, inside + beside, tensors, options)
    weights.notes, weights.left_out = notes, (*opened.others, *scales)
    weights.facts = recorded_facts(transformer)
    return weights


def _expert_notes(transformer: Path) -> tuple[str, ...]:
    """What a pipeline's folder says of its transformers: a note on one of two, given by itself."""
    pipeline = transformer.parent / PIPELINE_NAME
    stated = read_json_object(pipeline, error=CheckpointError) if pipeline.is_file() else {}
    notes = []
    if (transformer.parent / SECOND_TRANSFORMER).is_dir() or transformer.name == SECOND_TRANSFORMER:
        other = TRANSFORMER if transformer.name == SECOND_TRANSFORMER else SECOND_TRANSFORMER
        side = "below" if transformer.name == SECOND_TRANSFORMER else "of at least"
        notes.append(
            f"one of two experts, for timesteps {side} {BOUNDARY} x 1000 "
            f"({BOUNDARY} is {stated.get(BOUNDARY)}); {other} is another model"
        )
    if stated.get("expand_timesteps"):
        notes.append(
            "Wan2.2's TI2V gets its image as a clean first latent frame with a timestep of its own, which no paradigm "
            "here does; read as text_to_video"
        )
    return tuple(notes)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_weights` writes, maybe with a release's parts, and nothing else."""
    found = {path.name for path in folder.iterdir()}
    required = {TRANSFORMER, CONDITIONING, SCHEDULER, PIPELINE_NAME}
    return required <= found <= required | set(RELEASE_PARTS)
