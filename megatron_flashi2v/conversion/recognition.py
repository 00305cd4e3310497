"""Tells by names what weights are: the format of a model, or what they are if they are no model of ours.

Names of the original code and of diffusers are those of the key table. Other names: Wan2.1's and Wan2.2's code bases
and their offspring (image, control and speech branches), and the adapters' common spellings.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_flashi2v.checkpoint.folders import MODEL_CONFIG_NAME
from megatron_flashi2v.checkpoint.manifest import MANIFEST_NAME
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.conversion.containers import EXPERTS, open_container
from megatron_flashi2v.runtime.files import read_json_object

TRANSFORMER = "transformer"
"""Subfolder of the transformer in a diffusers folder."""
SECOND_TRANSFORMER = "transformer_2"
"""Subfolder of the second of two experts, the one for low noise."""
AUTO = "auto"
"""In place of a source's format: whichever is recognised."""

# A tensor that tells a format; the first that matches.
_FORMATS = (
    ("megatron", r"blocks\.0\.self_attention\.linear_qkv\.weight"),
    ("diffusers", r"condition_embedder\.time_embedder\.linear_1\.weight"),
    ("flashi2v-npu", r"text_embedding\.linear_1\.weight"),
    ("flashi2v-gpu", r"learnable_proj\.proj\.0\.weight"),
    ("wan", r"time_projection\.1\.weight"),
)


@dataclass(frozen=True)
class _Other:
    """Weights that are no model of ours.

    Attributes:
        mark: matches the end of a tensor's name.
        what: for a message.
        step: what to do next.
    """

    mark: str
    what: str
    step: str


_BRANCH = "which no paradigm here has; give the weights of a text-to-video model or of Wan's I2V"

_FIRST_AND_LAST = _Other(
    r"img_emb\.emb_pos|image_embedder\.pos_embed",
    "Wan2.1's model of first and last frames (FLF2V): it has positions for the rows of two images,", _BRANCH,
)

_OTHERS = (
    _Other(
        r"lora_[AB](\.\w+)?\.weight|lora_(up|down)\.weight|hada_w\d_[ab]|lokr_w\d(_[ab])?|diff_b", "an adapter (LoRA)",
        "give its base by --from and the adapter by --adapter FILE --merge, or --to diffusers-lora (comfyui-lora) for "
        "the adapter by itself",
    ),
    _Other(
        r"\.absmax|\.quant_map|\.qweight|\.qzeros|\.proj_down", "weights quantised to 4 bits or by a table",
        "give the bf16 or fp16 weights that they were made from",
    ),
    _Other(
        r"decoder\.(middle\.0\.residual\.2|conv_in|mid_block\.resnets\.0\.conv1)\.weight", "a VAE",
        "give the transformer's weights here; `convert --to encoders` makes the folder that --vae takes",
    ),
    _Other(
        r"blocks?\.0\.(attn\.q|layer\.0\.SelfAttention\.q)\.weight", "a T5 text encoder",
        "give the transformer's weights here; `convert --to encoders` makes the folder that --text-encoder takes",
    ),
    _Other(
        r"visual\.(transformer\.0\.attn\.to_qkv|conv1|patch_embedding)\.weight|embeddings\.patch_embedding\.weight",
        "a CLIP image encoder",
        "give the transformer's weights here; `convert --to encoders` makes the folder that --image-encoder takes",
    ),
    _Other(r"vace_patch_embedding\.weight", "Wan's VACE: it has blocks for a control video,", _BRANCH),
    _Other(r"(ref_conv|control_adapter\.conv)\.weight", "a control model: it has a branch for control,", _BRANCH),
    _Other(
        r"(audio_injector\.injector\.\d+\.q|casual_audio_encoder\.weights|face_adapter\.fuser_blocks\.0\.linear1_q"
        r"|pose_patch_embedding)(\.weight)?",
        "Wan's model for speech or animation: it has a branch for sound or a face,", _BRANCH,
    ),
    _FIRST_AND_LAST,
)  # fmt: skip

FIRST_AND_LAST = f"{_FIRST_AND_LAST.what} {_FIRST_AND_LAST.step}"
"""For a message on Wan2.1's models of first and last frames."""


def format_of_names(names: Collection[str]) -> str | None:
    """The format whose model has such tensors; None if no format's has."""
    return next((form for form, mark in _FORMATS if _matches(mark, names)), None)


def require_model(source: Path, names: Collection[str]) -> None:
    """Refuse weights that are something else than a model of ours.

    Raises:
        CheckpointError: says what they are, by which tensor, and what to do.
    """
    for other in _OTHERS:
        name = _matches(other.mark, names)
        if name is not None:
            joint = " " if other.what.endswith(",") else "; "
            raise CheckpointError(f"{source} (tensor {name}) is {other.what}{joint}{other.step}")


def _matches(mark: str, names: Collection[str]) -> str | None:
    """The first name that ends in the mark."""
    pattern = re.compile(rf"(.*\.)?({mark})") if not mark.startswith(r"\.") else re.compile(rf".*({mark})")
    return next((name for name in names if pattern.fullmatch(name)), None)


def channels_named(latent_channels: int, input_channels: int) -> str:
    """What a model with so many input channels may be; empty if unknown. For a message."""
    if input_channels - latent_channels >= 2 * latent_channels:
        return (
            "a control model, such as Wan2.1-Fun-Control (48 channels) or Wan2.2-Fun-Control (52), whose input holds a "
            "control video beside the image; no paradigm here takes one"
        )
    return ""


def recognise_format(path: Path) -> str | None:
    """The format of the weights at a path, by its folders, configuration and tensors' names; None if unknown.

    Reads no tensor's values. Never raises on damaged files: opening them in their format does.
    """
    try:
        if path.is_dir():
            if _is_ours(path):
                return "megatron"
            if (path / TRANSFORMER / "config.json").is_file() or _names_diffusers(path / "config.json"):
                return "diffusers"
        found = format_of_names(open_container(path).tensors)
        return "torch-dist" if found == "megatron" and path.is_dir() else found
    except (UserError, OSError):
        return None


class PairFolders(NamedTuple):
    """Two experts that lie in one folder, and what format's readers take them; ``auto`` if it is unknown."""

    form: str
    high: Path
    low: Path


def find_pair(folder: Path) -> PairFolders | None:
    """The experts in a folder that holds both, in diffusers' layout or Wan's, and no other model of its own.

    Reads no tensor's values.
    """
    for names in ((TRANSFORMER, SECOND_TRANSFORMER), EXPERTS):
        high, low = (folder / name for name in names)
        if high.is_dir() and low.is_dir() and recognise_format(folder) in (None, "diffusers"):
            form = recognise_format(high)
            return PairFolders(AUTO if form is None or form != recognise_format(low) else form, high, low)
    return None


def require_format(path: Path) -> str:
    """As :func:`recognise_format`.

    Raises:
        CheckpointError: the format is unknown, or a file is damaged; says what the path holds as far as it can.
    """
    found = recognise_format(path)
    if found is not None:
        return found
    tensors = open_container(path).tensors  # what hinders this is the better message
    require_model(path, tensors)
    raise CheckpointError(f"{path} holds {len(tensors)} tensors of no format that is known here; give the format")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours or holds some."""
    return (folder / MANIFEST_NAME).is_file() or any(
        (child / MANIFEST_NAME).is_file() and (child / MODEL_CONFIG_NAME).is_file()
        for child in folder.iterdir() if child.is_dir() and child.name.startswith("iter_")
    )  # fmt: skip


def _names_diffusers(path: Path) -> bool:
    """Whether a configuration names diffusers' class, and the weights beside have diffusers' names."""
    if not path.is_file():
        return False
    if read_json_object(path, error=CheckpointError).get("_class_name") != "WanTransformer3DModel":
        return False
    return format_of_names(open_container(path.parent).tensors) in ("diffusers", None)
