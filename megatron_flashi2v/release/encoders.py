"""``convert --to encoders``: Wan's own VAE, T5 and CLIP files as the folders that ``--vae``, ``--text-encoder``,
``--tokenizer`` and ``--image-encoder`` take.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.comparison import as_bytes
from megatron_flashi2v.conversion.containers import open_file
from megatron_flashi2v.conversion.wan_clip import image_processor_settings, open_image_encoder
from megatron_flashi2v.conversion.wan_encoders import EncoderWeights, open_text_encoder, open_vae
from megatron_flashi2v.conversion.weights import write_hub_folder
from megatron_flashi2v.encoders.image import PROCESSOR_FILE, PROCESSOR_FOLDER
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object, require_space
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.runtime.publishing import require_replaceable, staged_folder

_IMAGE_ENCODER = "image_encoder"
_FILES = {
    "vae": ("Wan2.1_VAE.pth", open_vae), "text_encoder": ("models_t5_*.pth", open_text_encoder),
    _IMAGE_ENCODER: ("models_clip_*.pth", open_image_encoder),
}  # fmt: skip
_TOKENIZER, _TOKENIZER_SOURCE = "tokenizer", Path("google/umt5-xxl")
_TOKENIZER_ENDINGS = (".json", ".model", ".txt")

logger = logging.getLogger(__name__)


def convert_encoders(config: ConvertConfig) -> tuple[str, ...]:
    """Write a folder for each encoder that lies in Wan's released folder, bit for bit.

    Args:
        config: its source is the folder, its target the one to write.

    Returns:
        Names of the folders that were written.

    Raises:
        UserError: the source holds none, a file is damaged or of another model, the target exists, or the disk is too
            small. Nothing is left under the target's name then.
    """
    source, target = config.source[1], config.target[1]
    with logging_to_stderr():
        require_replaceable(target, config.overwrite, _is_ours)
        opened: dict[str, EncoderWeights] = {}
        for name, (pattern, open_encoder) in _FILES.items():
            found = sorted(source.glob(pattern)) if source.is_dir() else []
            if found:
                opened[name] = open_encoder(found[0])
        if not opened:
            wanted = ", ".join(pattern for pattern, _ in _FILES.values())
            raise CheckpointError(f"{source} holds no encoder of Wan's ({wanted}); give the folder that Wan released")
        nbytes = sum(group.nbytes for weights in opened.values() for group in weights.groups())
        require_space(target, nbytes + 64_000_000, "the conversion")
        with staged_folder(target, overwrite=config.overwrite) as folder:
            for name, weights in opened.items():
                (folder / name).mkdir()
                write_hub_folder(folder / name, weights.stem, weights.groups(), config.max_shard_bytes)
                weights.save_config(folder / name)
                if config.verify:
                    _require_equal(folder / name, weights)
            names = (*opened, *_copy_tokenizer(source, folder), *_describe_processor(folder))
        logger.info("wrote %s: %s, %.1f MB", target, ", ".join(names), nbytes / 1e6)
    return names


def _is_ours(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {*_FILES, _TOKENIZER, PROCESSOR_FOLDER}


def _copy_tokenizer(source: Path, folder: Path) -> tuple[str, ...]:
    files = [path for path in (source / _TOKENIZER_SOURCE).glob("*") if path.suffix in _TOKENIZER_ENDINGS]
    if not files:
        return ()
    (folder / _TOKENIZER).mkdir()
    for path in files:
        shutil.copyfile(path, folder / _TOKENIZER / path.name)
    return (_TOKENIZER,)


def _describe_processor(folder: Path) -> tuple[str, ...]:
    """Write how pictures are made ready for the image encoder, as diffusers' layout has it."""
    if not (folder / _IMAGE_ENCODER).is_dir():
        return ()
    (folder / PROCESSOR_FOLDER).mkdir()
    size = read_json_object(folder / _IMAGE_ENCODER / "config.json", error=CheckpointError)["image_size"]
    atomic_write_json(folder / PROCESSOR_FOLDER / PROCESSOR_FILE, image_processor_settings(size))
    return (PROCESSOR_FOLDER,)


def _require_equal(folder: Path, weights: EncoderWeights) -> None:
    """Read the written files again and compare every tensor's bytes."""
    for path in sorted(folder.glob("*.safetensors")):
        for name, written in open_file(path).tensors.items():
            if not torch.equal(as_bytes(written.read()), as_bytes(weights.tensors[name].read())):
                raise CheckpointError(f"{path}: tensor {name} differs from {weights.tensors[name].path}")
