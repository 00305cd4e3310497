"""A decoded frame as the picture that players show: matrix, range, transparency, dynamic range, orientation, shape.

The two renderings are :class:`ShownPicture`, and :class:`StoredPicture`, which reads pixels as FlashI2V's reference
does. Both are made for the first frame of a file and serve all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, Interpolation
from numpy.typing import NDArray

from megatron_flashi2v.data.colours import Gamut, Transfer, to_srgb

HD_LINES = 720
"""Untagged pictures of so many lines are BT.709, smaller ones BT.601."""

_EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
"""Without these flags FFmpeg takes the white of many formats to 253 of 255; with them its 16-bit colours are wrong."""
_OUTPUTS = {(8, False): "rgb24", (8, True): "rgba", (16, False): "rgb48le", (16, True): "rgba64le"}
"""FFmpeg's formats by bits of a channel and whether there is transparency."""
_LOSSY = ("h264", "hevc", "av1", "vp9", "vvc")
"""Codecs whose untagged grey pictures are of limited range, as their standards say."""


class Range(IntEnum):
    """FFmpeg's numbers of ranges."""

    UNSPECIFIED = 0
    LIMITED = 1
    FULL = 2


class UnsupportedPictureError(Exception):
    """A picture's form is known, and known not to come out right."""


# FFmpeg's numbers of colour tags (H.273), and what becomes of them.
_UNSPECIFIED = (0, 2, 3)
_MATRICES = {
    1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601, 7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}  # fmt: skip
_REFUSED_MATRICES = {
    8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "YDzDx", 12: "a matrix derived from its primaries",
    13: "a matrix derived from its primaries, with constant luminance", 14: "ICtCp", 15: "IPT-C2 (Dolby Vision)",
    16: "YCgCo-R, even", 17: "YCgCo-R, odd",
}  # fmt: skip
_TRANSFERS = {8: Transfer.LINEAR, 16: Transfer.PQ, 18: Transfer.HLG}
_REFUSED_TRANSFERS = {9: "logarithmic", 10: "logarithmic (square root)", 17: "SMPTE ST 428"}
_GAMUTS: dict[int, Gamut] = {9: "bt2020", 11: "p3", 12: "p3"}
_REFUSED_GAMUTS = {10: "CIE XYZ"}
_REFUSED_FORMATS = (
    "xyz12",  # other primaries and gamma
    "rgb565be", "bgr565be", "rgb555be", "bgr555be",  # FFmpeg mixes their bytes up
    "rgb444", "bgr444", "rgb8", "bgr8",  # FFmpeg's white of these is 240 or 252
    "yaf",  # FFmpeg aborts
)  # fmt: skip
"""Beginnings of the names of pixel formats that FFmpeg does not take to RGB as it must."""


@dataclass(frozen=True, kw_only=True)
class Colours:
    """How a frame's samples stand for colours.

    Attributes:
        matrix: from YUV to RGB; plays no part in RGB and grey pictures.
        full_range: whether black and white are the least and the greatest sample.
        transfer: how levels stand for light.
        gamut: the primaries; those of BT.601 are taken for BT.709's.
    """

    matrix: Colorspace
    full_range: bool
    transfer: Transfer
    gamut: Gamut


def colours_of(frame: av.VideoFrame, codec: str) -> Colours:
    """Read a frame's tags, and fill in what players fill in.

    Args:
        frame: decoded.
        codec: name of its decoder.

    Raises:
        UnsupportedPictureError: the tags name a form that cannot be shown right.
    """
    if _has_dolby_vision(frame) and frame.color_trc in _UNSPECIFIED:
        raise UnsupportedPictureError("is Dolby Vision without a base layer that is a picture by itself")
    _refuse(frame.color_trc, _REFUSED_TRANSFERS, "transfer")
    _refuse(frame.color_primaries, _REFUSED_GAMUTS, "primaries")
    transfer = _TRANSFERS.get(frame.color_trc, Transfer.SDR)
    is_hdr = transfer in (Transfer.PQ, Transfer.HLG)
    wide = is_hdr and frame.color_primaries in _UNSPECIFIED
    gamut: Gamut = "bt2020" if wide else _GAMUTS.get(frame.color_primaries, "bt709")
    return Colours(
        matrix=_matrix(frame, gamut), full_range=_is_full_range(frame, codec), transfer=transfer, gamut=gamut
    )


def _has_dolby_vision(frame: av.VideoFrame) -> bool:
    return any(_side_data(frame, kind) is not None for kind in (Type.DOVI_METADATA, Type.DOVI_RPU_BUFFER))


def _side_data(frame: av.VideoFrame, kind: Type) -> bytes | None:
    try:
        data: Any = frame.side_data.get(kind.name)
    except ValueError:  # the frame carries data that this PyAV has no name for
        return None
    return None if data is None else bytes(data)


def _refuse(tag: int, refused: dict[int, str], what: str) -> None:
    if tag in refused:
        raise UnsupportedPictureError(f"has colours in a form that is not read ({what}: {refused[tag]})")


def _matrix(frame: av.VideoFrame, gamut: Gamut) -> Colorspace:
    if _is_rgb(frame) or _is_grey(frame):
        return Colorspace.DEFAULT
    _refuse(frame.colorspace, _REFUSED_MATRICES, "matrix")
    if frame.colorspace in _MATRICES:
        return _MATRICES[frame.colorspace]
    if gamut == "bt2020":
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.height >= HD_LINES else Colorspace.ITU601


def _is_full_range(frame: av.VideoFrame, codec: str) -> bool:
    if frame.format.name.startswith("yuvj"):
        return True
    if frame.color_range != Range.UNSPECIFIED:
        return frame.color_range == Range.FULL
    return _is_rgb(frame) or (_is_grey(frame) and not any(name in codec for name in _LOSSY))


def _is_rgb(frame: av.VideoFrame) -> bool:
    kind = frame.format
    return kind.is_rgb or kind.has_palette or kind.is_bayer or kind.name.startswith("mono")


def _is_grey(frame: av.VideoFrame) -> bool:
    return not _is_rgb(frame) and sum(not component.is_alpha for component in frame.format.components) == 1


def has_alpha(frame: av.VideoFrame) -> bool:
    """Return whether the frame's format can be transparent."""
    kind = frame.format
    return kind.has_palette or any(component.is_alpha for component in kind.components)


def to_rgb(frame: av.VideoFrame, codec: str) -> NDArray[np.uint8]:
    """A frame's stored pixels in sRGB, laid on white.

    Args:
        frame: decoded.
        codec: name of its decoder.

    Returns:
        uint8 [H, W, 3]; neither turned nor stretched.

    Raises:
        UnsupportedPictureError: the frame's form cannot be shown right.
        av.FFmpegError: FFmpeg cannot convert it.
    """
    if frame.format.name.startswith(_REFUSED_FORMATS):
        raise UnsupportedPictureError(f"has colours in a form that is not read (pixel format {frame.format.name})")
    colours = colours_of(frame, codec)
    is_yuv = not (_is_rgb(frame) or _is_grey(frame))
    if colours.transfer == Transfer.SDR and colours.gamut == "bt709":
        pixels_HWC = _convert(frame, colours, 8, is_yuv)
        rgb_HWC, alpha_HW1 = pixels_HWC[..., :3], pixels_HWC[..., 3:]
        if not (colours.full_range or is_yuv):  # FFmpeg takes these for full range whatever their tag says
            rgb_HWC = _from_limited(rgb_HWC)
    else:
        pixels_HWC = _convert(frame, colours, 16, is_yuv)
        black, white = (0, 65535) if colours.full_range else (0, 255 << 8) if is_yuv else (16 << 8, 235 << 8)
        rgb_HWC = to_srgb(pixels_HWC[..., :3], colours.transfer, colours.gamut, black=black, white=white)
        alpha_HW1 = pixels_HWC[..., 3:] >> 8
    return on_white(rgb_HWC, alpha_HW1) if alpha_HW1.size else rgb_HWC


def _convert(frame: av.VideoFrame, colours: Colours, depth: int, is_yuv: bool) -> NDArray[Any]:
    """RGB or, of formats that can be transparent, RGBA."""
    options: dict[str, int] = {}
    if is_yuv:
        options["src_colorspace"] = int(colours.matrix)
        options["src_color_range"] = int(Range.FULL if colours.full_range else Range.LIMITED)
    # FFmpeg's quick way for the most common formats is exact; its general way needs to be asked.
    quick = frame.format.name in ("yuv420p", "yuvj420p") and frame.height % 2 == 0
    if depth == 8 and not quick:
        options["interpolation"] = int(_EXACT)
    reformatted = frame.reformat(format=_OUTPUTS[depth, has_alpha(frame)], **options)
    return reformatted.to_ndarray()


def _from_limited(levels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scaled_HWC = (levels_HWC.astype(np.float32) - 16) * np.float32(255 / 219)
    return np.clip(np.rint(scaled_HWC), 0, 255).astype(np.uint8)


def on_white(rgb_HWC: NDArray[np.uint8], alpha_HW1: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Straight alpha, 0 to 255, over a white ground."""
    alpha_HW1 = alpha_HW1.astype(np.uint32)
    return ((rgb_HWC * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255).astype(np.uint8)


class Rendering(Protocol):
    """From decoded frames to pictures.

    Attributes:
        height: rows of a picture.
        width: columns of a picture.
        upright_size: (height, width) before pixels are made square, in which crops are counted.
    """

    height: int
    width: int
    upright_size: tuple[int, int]

    def picture(self, frame: av.VideoFrame, crop: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
        """uint8 RGB [H, W, 3].

        Args:
            frame: of the size of the first one.
            crop: (x_start, x_end, y_start, y_end) in pixels of the upright picture before it is stretched.
        """


class StoredPicture:
    """Pixels as they are stored, in quarter turns upright, which is how FlashI2V's reference reads them.

    Args:
        first: the file's first frame.
    """

    def __init__(self, first: av.VideoFrame) -> None:
        self._turns = round(first.rotation / 90) % 4
        self.upright_size = _upright(first, transposed=self._turns % 2 == 1)
        self.height, self.width = self.upright_size

    def picture(self, frame: av.VideoFrame, crop: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
        """See :class:`Rendering`."""
        return _cut(np.rot90(frame.to_ndarray(format="rgb24"), self._turns), crop)


class ShownPicture:
    """Pixels as players show them.

    Args:
        first: the file's first frame.
        codec: name of its decoder.
        pixel_aspect: width / height of a stored pixel; None and 0 are square.
    """

    def __init__(self, first: av.VideoFrame, codec: str, pixel_aspect: Fraction | None) -> None:
        self._codec = codec
        self._transposed, self._flip_rows, self._flip_columns = orientation_of(first)
        # As in players, one side grows and none shrinks.
        aspect = pixel_aspect if pixel_aspect and pixel_aspect > 0 else Fraction(1)
        aspect = 1 / aspect if self._transposed else aspect
        self._stretch = (max(Fraction(1), 1 / aspect), max(Fraction(1), aspect))
        self.upright_size = _upright(first, transposed=self._transposed)
        self.height, self.width = self._stretched(self.upright_size)

    def picture(self, frame: av.VideoFrame, crop: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
        """See :class:`Rendering`."""
        picture_HWC = to_rgb(frame, self._codec)
        if self._transposed:
            picture_HWC = picture_HWC.swapaxes(0, 1)
        picture_HWC = picture_HWC[:: -1 if self._flip_rows else 1, :: -1 if self._flip_columns else 1]
        picture_HWC = _cut(picture_HWC, crop)
        size = self._stretched(picture_HWC.shape[:2])
        return picture_HWC if size == picture_HWC.shape[:2] else _resize(picture_HWC, size)

    def _stretched(self, size: tuple[int, ...]) -> tuple[int, int]:
        height, width = (max(1, round(side * factor)) for side, factor in zip(size, self._stretch, strict=True))
        return height, width


_QUARTER_TURNS = ((False, False, False), (True, True, False), (False, True, True), (True, False, True))
"""Counter-clockwise, as :func:`orientation_of` gives them."""


def orientation_of(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How the display matrix turns a frame: (transpose, then flip the rows, flip the columns).

    Slanted matrices are taken for the nearest quarter turn, as in most players.
    """
    data = _side_data(frame, Type.DISPLAYMATRIX)
    if data is None:
        return _QUARTER_TURNS[round(frame.rotation / 90) % 4]
    # x' = a x + c y and y' = b x + d y, y downward, of the rows (a, b, u), (c, d, v) and (x, y, w).
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].astype(np.int64)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, bool(d < 0), bool(a < 0)
    return True, bool(b < 0), bool(c < 0)


def _upright(frame: av.VideoFrame, *, transposed: bool) -> tuple[int, int]:
    return (frame.width, frame.height) if transposed else (frame.height, frame.width)


def _cut(picture_HWC: NDArray[np.uint8], crop: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
    if crop is not None:
        x_start, x_end, y_start, y_end = crop
        picture_HWC = picture_HWC[y_start:y_end, x_start:x_end]
    return np.ascontiguousarray(picture_HWC)


def _resize(picture_HWC: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    picture_1CHW = torch.from_numpy(picture_HWC).permute(2, 0, 1)[None]
    resized_1CHW = torch.nn.functional.interpolate(
        picture_1CHW, size=size, mode="bicubic", align_corners=False, antialias=True
    )
    return np.ascontiguousarray(resized_1CHW[0].permute(1, 2, 0).numpy())
