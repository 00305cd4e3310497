"""The condition image: read from a picture or a video's first frame, and fitted to the sample's size.

Shape suffixes: B images, C = 3 colours, H and W rows and columns.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import UnidentifiedImageError
from PIL.Image import Image

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.pictures import PictureError, picture_to_tensor, read_picture
from megatron_flashi2v.data.transforms import cover_size, resize_and_crop
from megatron_flashi2v.data.video import Video
from megatron_flashi2v.runtime.logging import AGREED, ONCE

ImageLike = Image | torch.Tensor | str | Path
"""A PIL image, a uint8 tensor ``[3, H, W]``, or a picture's or video's file."""
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
            f"image {path}: no such file; give a picture (png, jpg) or a video, whose first frame is used"
        )
    try:
        return read_picture(path)
    except UnidentifiedImageError:
        return _first_frame(path)
    except PictureError as error:
        raise DataError(f"image {error}; give another file") from error


def fit_image(image: ImageLike, height: int, width: int) -> torch.Tensor:
    """Resize to cover and crop at the centre, exactly as training clips are.

    Returns:
        uint8 ``[3, height, width]``.

    Raises:
        DataError: a file as for :func:`load_image`.
        ValueError: a tensor that is not uint8 ``[3, H, W]``.
    """
    if isinstance(image, (str, Path)):
        image = load_image(Path(image))
    if not isinstance(image, torch.Tensor):
        image = picture_to_tensor(image)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image tensor must be uint8 [3, H, W], not {image.dtype} {list(image.shape)}")
    _tell_loss(image.shape[1], image.shape[2], height, width)
    return resize_and_crop(image.unsqueeze(0), height, width)[0]


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
