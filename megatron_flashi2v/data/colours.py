"""High dynamic range and wide gamuts to sRGB: BT.2100's PQ and HLG, and BT.2020's and P3's primaries.

Diffuse white, 203 nits (ITU-R BT.2408), becomes the white of an ordinary screen, so that what an ordinary video shows
looks the same in an HDR one; brighter highlights are compressed into the uppermost levels.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Gamut = Literal["bt709", "bt2020", "p3"]

WHITE_NITS = 203.0
"""Luminance of diffuse white in an HDR picture (ITU-R BT.2408)."""
HLG_PEAK_NITS = 1000.0
"""Nominal peak of the display for which HLG's system gamma is 1.2 (ITU-R BT.2100)."""
HLG_GAMMA = 1.2
KNEE = 0.9
"""Linear level, of white's, from which highlights are compressed; what is darker stays as it is."""
_LEVELS = 65536

# Chromaticities (x, y) of red, green and blue; white is D65 in all of them.
_PRIMARIES: dict[Gamut, tuple[tuple[float, float], ...]] = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)


class Transfer(IntEnum):
    """How code values stand for light."""

    SDR = 0
    LINEAR = 1
    PQ = 2
    HLG = 3


def to_srgb(
    levels_HWC: NDArray[np.uint16], transfer: Transfer, gamut: Gamut, *, black: int = 0, white: int = 65535
) -> NDArray[np.uint8]:
    """Code values to sRGB of an ordinary screen.

    Args:
        levels_HWC: uint16 [H, W, 3], non-linear RGB.
        transfer: how the codes stand for light.
        gamut: the primaries.
        black: level of the code value 0.
        white: level of the code value 1.

    Returns:
        uint8 [H, W, 3].
    """
    out_HWC = np.empty(levels_HWC.shape, np.uint8)
    matrix, table = _to_bt709(gamut), _light_table(transfer, black, white)
    for row, levels_WC in enumerate(levels_HWC):  # a row at a time stays in the cache
        light_WC = np.take(table, levels_WC)
        if transfer == Transfer.HLG:
            light_WC = _displayed(light_WC)
        light_WC = np.maximum(light_WC @ matrix.T, 0.0)
        if transfer in (Transfer.PQ, Transfer.HLG):
            light_WC = _compress(light_WC)
        out_HWC[row] = np.take(_srgb_table(), np.rint(np.minimum(light_WC, 1.0) * (_LEVELS - 1)).astype(np.uint16))
    return out_HWC


def _compress(light_WC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each pixel so that its greatest channel stays below white; hues are kept."""
    peak_W = np.maximum(np.maximum(light_WC[:, 0], light_WC[:, 1]), light_WC[:, 2])
    bright = peak_W > KNEE
    room = 1.0 - KNEE
    bent = KNEE + room * (1.0 - np.exp(-(peak_W[bright] - KNEE) / room))
    light_WC[bright] *= (bent / peak_W[bright])[:, None]
    return light_WC


def _displayed(scene_WC: NDArray[np.float32]) -> NDArray[np.float32]:
    """HLG's scene light, in [0, 1], to display light in units of diffuse white (BT.2100's OOTF)."""
    luminance_W1 = scene_WC @ np.array([[0.2627], [0.6780], [0.0593]], np.float32)
    return scene_WC * (luminance_W1 ** np.float32(HLG_GAMMA - 1.0)) * np.float32(HLG_PEAK_NITS / WHITE_NITS)


@lru_cache(maxsize=16)
def _light_table(transfer: Transfer, black: int, white: int) -> NDArray[np.float32]:
    """Light of each level: in units of diffuse white, or HLG's scene light in [0, 1]."""
    codes = np.clip((np.arange(_LEVELS, dtype=np.float64) - black) / (white - black), 0.0, 1.0)
    functions: dict[Transfer, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        Transfer.SDR: _srgb_to_linear,
        Transfer.LINEAR: lambda values: values,
        Transfer.PQ: lambda values: pq_to_nits(values) / WHITE_NITS,
        Transfer.HLG: hlg_to_scene,
    }
    return functions[transfer](codes).astype(np.float32)


@lru_cache(maxsize=1)
def _srgb_table() -> NDArray[np.uint8]:
    """sRGB levels of evenly spaced linear light."""
    light = np.arange(_LEVELS, dtype=np.float64) / (_LEVELS - 1)
    codes = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * codes).astype(np.uint8)


def pq_to_nits(codes: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084's EOTF: code values in [0, 1] to cd/m2."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = codes ** (1 / m2)
    return 10_000.0 * (np.maximum(power - c1, 0.0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_to_scene(codes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of BT.2100's HLG OETF: code values in [0, 1] to scene light in [0, 1]."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)


def _srgb_to_linear(codes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)


@lru_cache(maxsize=len(_PRIMARIES))
def _to_bt709(gamut: Gamut) -> NDArray[np.float32]:
    """The matrix that takes linear RGB of ``gamut`` to linear RGB of BT.709."""
    return (np.linalg.inv(_rgb_to_xyz("bt709")) @ _rgb_to_xyz(gamut)).astype(np.float32)


def _rgb_to_xyz(gamut: Gamut) -> NDArray[np.float64]:
    columns = np.array([_xyz(chromaticity) for chromaticity in _PRIMARIES[gamut]]).T
    return columns * np.linalg.solve(columns, _xyz(_D65))


def _xyz(chromaticity: tuple[float, float]) -> NDArray[np.float64]:
    x, y = chromaticity
    return np.array([x / y, 1.0, (1.0 - x - y) / y])
