"""``videomae:FOLDER``: the mean of VideoMAE's last hidden states (Z. Tong et al., arXiv 2203.12602)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.folders import read_model_config, require_all_weights, require_files
from megatron_flashi2v.evaluation.chunks import Chunks
from megatron_flashi2v.evaluation.features.base import VideoFeatures, folder_sha256, resized
from megatron_flashi2v.evaluation.videos import VideoShape

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, where the folder has no preprocessor_config.json."""


class VideoMAEFeatures(VideoFeatures):
    """A VideoMAE in evaluation mode.

    Args:
        folder: transformers' layout with safetensors weights; of a classifier, the head is left out.
        device: where it runs.

    Raises:
        ConfigError: a file is missing or damaged, or the folder holds another model.
    """

    measure = "Fréchet distance of VideoMAE features"
    batch = 4

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        config = read_model_config(folder, "VideoMAE")
        if config.get("model_type") != "videomae":
            raise ConfigError(
                f"--features videomae:{folder}: config.json names the model {config.get('model_type')!r}; it must be "
                "videomae"
            )
        require_files(folder, "VideoMAE", "*.safetensors")
        from transformers import VideoMAEModel

        try:
            loaded: Any = VideoMAEModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(f"--features videomae:{folder}: cannot be loaded ({error})") from error
        model, report = loaded
        require_all_weights(folder, "VideoMAE", list(report["missing_keys"]))
        self._model = model.float().eval().requires_grad_(False).to(device)
        self._sha256 = folder_sha256(folder, ("config.json", "*.safetensors"))
        self._mean, self._std = _normalisation(folder)
        self._side = int(model.config.image_size)
        self.width = int(model.config.hidden_size)
        self.still_frames = int(model.config.num_frames)

    def settings(self) -> dict[str, Any]:
        return {"features": "videomae", "width": self.width, "sha256": self._sha256,
                "pixels": [self._side, self._side], "resize": "bilinear, antialiased", "mean": list(self._mean),
                "std": list(self._std)}  # fmt: skip

    def check(self, chunks: Chunks, shape: VideoShape) -> None:
        if chunks.frames != self.still_frames:
            raise ConfigError(
                f"--chunk-frames is {chunks.frames}; it must be {self.still_frames}, as this VideoMAE's clips"
            )

    @torch.no_grad()
    def embed(self, clips_BTHWC: torch.Tensor) -> torch.Tensor:
        clips_BTCHW = resized(clips_BTHWC.to(self._model.device), self._side, self._side, antialias=True) / 255
        mean, std = (clips_BTCHW.new_tensor(values).view(3, 1, 1) for values in (self._mean, self._std))
        return self._model(pixel_values=(clips_BTCHW - mean) / std).last_hidden_state.mean(dim=1)


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that the model was trained with."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return IMAGE_MEAN, IMAGE_STD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (tuple(map(float, values[name])) for name in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: must be a JSON object with image_mean and image_std ({error!r})") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(f"{path}: image_mean and image_std must hold three numbers, the latter above 0")
    return mean, std
