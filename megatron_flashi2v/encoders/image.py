"""The frozen image encoder: transformers' CLIPVisionModel and its processor, one row per patch and one for the class.

Shapes: B images, C = 3 colours, H rows, W columns, R rows of the encoder, D their width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.folders import model_folder, read_model_config, require_all_weights, require_files

PROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FOLDER = "image_processor"


class ImageEncoder:
    """Images to rows; no gradients.

    Wan2.1's image-to-video models take the output of the last layer but one, class token included.

    Args:
        model: a CLIPVisionModel, loaded and on its device; it is put into evaluation mode.
        processor: resizes, crops and normalises pictures for it.
        source: folder that they came from, for errors.
    """

    def __init__(self, model: Any, processor: Any, *, source: str) -> None:
        self._model = model.eval().requires_grad_(False)
        self._processor = processor
        self.source = source
        self.rows = 1 + (model.config.image_size // model.config.patch_size) ** 2
        self.width: int = model.config.hidden_size

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> ImageEncoder:
        """Read a transformers folder (safetensors weights only), as :func:`model_folder` finds it.

        Args:
            folder: usually ``image_encoder`` in a pipeline's folder.
            device: where it runs.
            dtype: of weights and computation.

        Raises:
            ConfigError: a file is missing or malformed, or the folder holds another model.
        """
        folder = model_folder(Path(folder), "image encoder")
        kind = read_model_config(folder, "image encoder").get("model_type")
        if kind != "clip_vision_model":
            raise ConfigError(
                f"image encoder folder {folder}: config.json's model_type is {kind!r}; it must be clip_vision_model"
            )
        require_files(folder, "image encoder", "*.safetensors")
        from safetensors import SafetensorError
        from transformers import CLIPVisionModel

        try:
            loaded: Any = CLIPVisionModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            raise ConfigError(f"image encoder folder {folder}: cannot be loaded ({error})") from error
        model, report = loaded
        # The norm behind the last layer is not used, and some files leave it out.
        missing = [name for name in report["missing_keys"] if "post_layernorm" not in name]
        require_all_weights(folder, "image encoder", missing)
        return cls(model.to(device=device, dtype=dtype), _processor(processor_folder(folder)), source=str(folder))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of an image, and their width."""
        return self.rows, self.width

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the rows, JSON-ready."""
        return {
            "class": "CLIPVisionModel",
            "rows": self.rows,
            "width": self.width,
            "num_layers": self._model.config.num_hidden_layers,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Rows [B, R, D] in fp32 on the encoder's device.

        Args:
            images_BCHW: RGB in [-1, 1], of any size; rounded to 8 bits, which the processor takes.
        """
        from PIL import Image

        levels_BHWC = ((images_BCHW.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        pictures = [Image.fromarray(levels_HWC.numpy()) for levels_HWC in levels_BHWC.cpu().contiguous()]
        pixels_BCHW = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
        states = self._model(
            pixels_BCHW.to(self._model.device, self._model.dtype), output_hidden_states=True
        ).hidden_states
        rows_BRD: torch.Tensor = states[-2].float()
        return rows_BRD


def processor_folder(folder: Path) -> Path:
    """Where an image encoder's processor is described: in its folder, or in ``image_processor`` beside it.

    Raises:
        ConfigError: in neither.
    """
    places = (folder, folder.parent / PROCESSOR_FOLDER)
    for place in places:
        if (place / PROCESSOR_FILE).is_file():
            return place
    raise ConfigError(
        f"image encoder folder {folder}: no {PROCESSOR_FILE} in it, nor in {places[1]}; give the one that came with it"
    )


def _processor(folder: Path) -> Any:
    import transformers

    # Pillow's resizing on every machine; later versions of transformers would take torchvision's where it is installed.
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    try:
        return processor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"image processor folder {folder}: cannot be loaded ({error})") from error
