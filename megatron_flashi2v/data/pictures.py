"""Still pictures of every mode that Pillow reads: upright, 8 bits a channel, sRGB, on white; or refused by name.

Pictures that become samples, condition images and images given to the diffusers pipeline all pass here.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.reasons import FileError

FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "TIFF", "JPEG2000", "BMP", "DIB", "PPM", "QOI", "SGI", "PCX", "DDS", "ICO",
    "PSD",
)  # fmt: skip
"""Formats that Pillow recognises by their first bytes and decodes by itself, without other programs."""
MOVING = ("GIF",)
"""Formats that FFmpeg reads as videos, and that are pictures where one is asked for."""
_SEQUENCES = ("PNG", "AVIF")
"""Formats whose files may hold more pictures than one, which FFmpeg then reads as a video."""
_UNMARKED = {".tga": "TGA"}
"""Formats without a mark of their own, by the ending of the file's name."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif")
_TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow's decoders raise."""

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Numbers of TIFF tags."""
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_SLACK = 0.1
"""How far beyond 0 and 1 the levels of a floating picture may swing, as resizing makes them, and be clipped."""


class PictureError(FileError):
    """A picture file cannot give a sample."""


def still_kind(path: Path) -> str | None:
    """Return whether a file is a still picture, from its first bytes.

    Returns:
        The format's name; None for a video and whatever else is no picture.
    """
    try:
        with path.open("rb") as file, Image.open(file, formats=_formats(path, FORMATS)) as image:
            moves = image.format in _SEQUENCES and getattr(image, "n_frames", 1) > 1
            return None if moves else image.format
    except UnidentifiedImageError:
        return _unread_kind(path)
    except Image.DecompressionBombError:
        return "picture"
    except _DECODER_ERRORS:
        return None


def read_picture(path: Path, max_pixels: int | None = None) -> torch.Tensor:
    """Read a picture file.

    Args:
        path: of the file.
        max_pixels: refuse larger ones before they are decoded; None leaves the limit to Pillow.

    Returns:
        uint8 ``[3, H, W]`` in red, green, blue.

    Raises:
        UnidentifiedImageError: the file is no picture.
        PictureError: the picture is damaged, too large, or of a mode that cannot be shown right.
    """
    try:
        # Given a path, Pillow maps files into memory, and does so wrongly where a TIFF's tag turns the picture.
        with path.open("rb") as file, Image.open(file, formats=_formats(path, FORMATS + MOVING)) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise PictureError(
                    path, "too_large", f"has {image.width} x {image.height} pixels; at most {max_pixels} are read"
                )
            return picture_to_tensor(image)
    except UnidentifiedImageError as error:
        kind = _unread_kind(path)
        if kind is None:
            raise
        raise PictureError(
            path, "unsupported_picture", f"is a {kind} picture of a kind that is not read; save it as a PNG"
        ) from error
    except UnreadableModeError as error:
        raise PictureError(path, "unsupported_picture", str(error)) from error
    except Image.DecompressionBombError as error:
        raise PictureError(path, "too_large", f"claims an absurd size ({error})") from error
    except _DECODER_ERRORS as error:
        raise PictureError(path, "unreadable", f"damaged picture ({error})") from error


class UnreadableModeError(DataError):
    """A picture's mode or levels leave open what is black and what is white."""


def picture_to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image of any mode as uint8 ``[3, H, W]``: upright, in sRGB, and on white.

    Raises:
        UnreadableModeError: the mode is unknown, or its levels cannot be scaled.
    """
    image.load()  # TIFFs are turned upright by it
    image = _eight_bits(image)
    image = _in_srgb(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode that Pillow takes to RGB as it must; EXIF and colour profile are kept."""
    mode = image.mode
    if mode == "La":
        return _like(image.convert("LA"), image)
    if mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        return image
    if mode == "F" or mode == "I" or mode.startswith("I;16"):
        levels_HW = np.asarray(image)
        grey_HW = _float_levels(levels_HW) if mode == "F" else _integer_levels(image, levels_HW)
        if _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:  # Pillow turns only its 8-bit pictures
            grey_HW = 255 - grey_HW
        key = image.info.get("transparency")
        if isinstance(key, int):
            alpha_HW = np.where(levels_HW == key, 0, 255).astype(np.uint8)
            return _like(Image.fromarray(np.stack([grey_HW, alpha_HW], axis=-1)), image)
        return _like(Image.fromarray(grey_HW), image)
    raise UnreadableModeError(f"the picture has Pillow's mode {mode!r}, which is not read; save it as an 8-bit PNG")


def _like(converted: Image.Image, image: Image.Image) -> Image.Image:
    """Give ``converted`` the orientation and the colour profile of ``image``."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation is not None:
        converted.getexif()[ExifTags.Base.Orientation] = orientation
    if "icc_profile" in image.info:
        converted.info["icc_profile"] = image.info["icc_profile"]
    return converted


def _integer_levels(image: Image.Image, levels_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Grey levels of 12, 16 or 32 bits to 8.

    32-bit files hold levels of any depth: the least of 8, 16 and all bits that holds the brightest is taken.
    """
    bits = int(_tag(image, _BITS, 32 if image.mode == "I" else 16))
    if image.mode != "I":
        return (levels_HW >> max(0, min(bits, 16) - 8)).astype(np.uint8)
    unsigned = bits == 32 and _tag(image, _SAMPLE_FORMAT, 2) == _UNSIGNED
    wide_HW = (levels_HW.view(np.uint32) if unsigned else levels_HW).astype(np.int64)
    low, high = int(wide_HW.min()), int(wide_HW.max())
    if low < 0:
        raise UnreadableModeError(f"the picture has levels down to {low}; black must be 0: save it as an 8-bit PNG")
    if image.format in ("PNG", "PPM"):  # these say that white is 65535
        top = 65535
    else:
        full = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        top = next((level for level in (255, 65535) if high <= level <= full), full)
    return ((wide_HW * 255 + top // 2) // top).astype(np.uint8)


def _float_levels(levels_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Floating grey levels, white being 1, 255 or 65535, whichever first holds the brightest, to 8 bits."""
    low, high = float(levels_HW.min()), float(levels_HW.max())
    top = next((white for white in (1.0, 255.0, 65535.0) if high <= white + _SLACK), None)
    too_dark = top is not None and top > 1 and high < top / 16  # such as 1.2, a highlight, which would come out black
    if top is None or too_dark or not low >= -_SLACK * top:  # the comparison with a NaN fails
        raise UnreadableModeError(
            f"the picture has floating levels of {low:g} to {high:g}; black must be 0 and white 1, 255 or 65535: save "
            "it as an 8-bit PNG"
        )
    return np.rint(np.clip(levels_HW / top, 0.0, 1.0) * 255).astype(np.uint8)


def _in_srgb(image: Image.Image) -> Image.Image:
    """Apply the colour profile that the file carries, as viewers do; a damaged one is left alone."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK") or "transparency" in image.info:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None
    return converted


def _tag(image: Image.Image, number: int, default: int) -> int:
    """The first value of a TIFF tag; ``default`` in other files."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) else value


def _formats(path: Path, marked: tuple[str, ...]) -> list[str]:
    Image.init()
    named = (*marked, _UNMARKED.get(path.suffix.lower()))
    return [kind for kind in named if kind in Image.OPEN]  # builds of Pillow differ


def _unread_kind(path: Path) -> str | None:
    """The format of a picture that Pillow does not read."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return None
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return "HEIF"
    return "TIFF" if start.startswith(_TIFF_MARKS) else None
