"""The condition image: an array, or read from a picture or a video's first frame; fitted to the sample's size.

Shape suffixes: B images, C = 3 colours, H and W rows and columns.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from PIL.Image import Image

from megatron_flashi2v.config.clips import Interpolation
from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.data.pictures import PictureError, picture_to_tensor, read_picture
from megatron_flashi2v.data.transforms import cover_size, resize_and_crop
from megatron_flashi2v.data.video import Video
from megatron_flashi2v.runtime.logging import AGREED, ONCE
from megatron_flashi2v.runtime.text import shown

ImageLike = Image | NDArray[Any] | torch.Tensor | str | Path
"""A PIL image, an array ``[H, W, 3]`` or tensor ``[3, H, W]``, or a picture's or video's file.

Arrays and tensors are uint8, or floating with black 0 and white 1, as diffusers has them.
"""

_SLACK = 0.01
"""How far beyond 0 and 1 floating levels may lie, as resizing makes them, and be clipped."""
LOSS_WORTH_TELLING = 0.05
"""Share of a picture."""

logger = logging.getLogger(__name__)


def load_image(path: Path) -> torch.Tensor:
    """Read a picture, or the first frame of a video, as uint8 ``[3, H, W]`` in red, green, blue.

    Raises:
        DataError: the file is missing, empty, or neither a picture nor a video.
    """
    if not path.is_file():
        raise DataError(
            f"image {shown(str(path))}: no such file; give a picture (png, jpg) or a video, whose first frame is used"
        )
    try:
        return read_picture(path)
    except UnidentifiedImageError:
        return _first_frame(path)
    except PictureError as error:
        raise DataError(f"image {error}; give another file") from error


def fit_image(
    image: ImageLike, height: int, width: int, interpolation: Interpolation = "bicubic"
) -> torch.Tensor:
    """Resize to cover and crop at the centre, exactly as training clips are.

    Returns:
        uint8 ``[3, height, width]``.

    Raises:
        DataError: a file as for :func:`load_image`.
        ConfigError: an array or tensor of another shape, type or range, or another object.
    """
    if isinstance(image, (str, Path)):
        tensor = load_image(Path(image))
    elif isinstance(image, Image):
        tensor = picture_to_tensor(image)
    elif isinstance(image, np.ndarray):
        tensor = _levels(torch.from_numpy(np.array(image)), "an array [H, W, 3]", channels=-1)
        tensor = tensor.permute(2, 0, 1)
    elif isinstance(image, torch.Tensor):
        tensor = _levels(image.cpu(), "a tensor [3, H, W]", channels=0)
    else:
        raise ConfigError(
            f"the image is a {type(image).__name__}; give a PIL image, an array [H, W, 3], a tensor [3, H, W] or a file"
        )
    _tell_loss(tensor.shape[1], tensor.shape[2], height, width)
    return resize_and_crop(tensor.unsqueeze(0), height, width, interpolation)[0]


def pair_with_prompts(images: list[ImageLike], prompts: list[str]) -> tuple[list[ImageLike], list[str]]:
    """Both lists at one length.

    Raises:
        ConfigError: they have other lengths, and neither has one entry, which serves all.
    """
    count = max(len(images), len(prompts))
    if not images or not prompts or len(images) not in (1, count) or len(prompts) not in (1, count):
        raise ConfigError(
            f"{len(images)} images and {len(prompts)} prompts; give as many of each, or one that serves all"
        )
    return images * (count // len(images)), prompts * (count // len(prompts))


def _levels(image: torch.Tensor, expected: str, channels: int) -> torch.Tensor:
    """The image in 8 bits; ``channels`` is the axis of its colours."""
    if image.ndim != 3 or image.shape[channels] != 3 or 0 in image.shape:
        raise ConfigError(f"the image's shape is {list(image.shape)}; it must be {expected}")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ConfigError(f"the image's type is {image.dtype}; it must be uint8, or floating with black 0 and white 1")
    low, high = float(image.min()), float(image.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # the comparison with a NaN fails
        raise ConfigError(
            f"the image's levels lie between {low:g} and {high:g}; floating levels must have black 0 and white 1: "
            "scale them, or give uint8"
        )
    return (image.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _tell_loss(height: int, width: int, target_height: int, target_width: int) -> None:
    """Warn where the crop cuts off more than :data:`LOSS_WORTH_TELLING` of a picture."""
    covering_height, covering_width = cover_size(height, width, target_height, target_width)
    lost = 1.0 - target_height * target_width / (covering_height * covering_width)
    if lost > LOSS_WORTH_TELLING:
        logger.warning(
            "a picture of %d x %d pixels is cropped at its centre to the shape of %d x %d, which cuts off %d%% of it; "
            "give --height and --width of its shape, or crop it yourself (told once)",
            width, height, target_width, target_height, round(100 * lost), extra={**AGREED, **ONCE},
        )


def _first_frame(path: Path) -> torch.Tensor:
    """The first frame of a video file, upright, uint8 ``[3, H, W]``."""
    try:
        with Video(path) as video:
            return video.read([0])[0]
    except DataError as error:
        raise DataError(
            f"image {path}: neither a picture nor a video that can be read ({error}); give a png, a jpg or an mp4"
        ) from error
