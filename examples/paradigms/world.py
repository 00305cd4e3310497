"""The world: one object on a board moves one cell a step in a direction that the caption names, and bounces.

Picture and caption decide the whole clip, so that every sample has one true continuation, and a sample can be checked
cell by cell. What is seen (background and object) has two domains; hues and laws are the same in both.

Shapes: T frames, H rows and W columns of pixels; a cell is :data:`CELL` pixels along each side.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_flashi2v.runtime.random import keyed_seed

CELL = 4
DIRECTIONS: dict[str, tuple[int, int]] = {
    "north": (-1, 0), "northeast": (-1, 1), "east": (0, 1), "southeast": (1, 1),
    "south": (1, 0), "southwest": (1, -1), "west": (0, -1), "northwest": (-1, -1),
}  # fmt: skip
"""By the caption's word: rows and columns of the first step."""
LAWS = tuple(DIRECTIONS)
DOMAINS = ("in", "out")
SPRITES: dict[str, tuple[str, ...]] = {
    "disk": (".##.", "####", "####", ".##."),
    "square": ("####", "####", "####", "####"),
    "pillars": ("#.##", "#.##", "#.##", "#.##"),
    "triangle": ("#...", "##..", "###.", "####"),
    "ring": ("####", "#..#", "#..#", "####"),
    "cross": ("#..#", ".##.", ".##.", "#..#"),
    "star": (".#..", "####", ".##.", "#..#"),
    "moon": (".###", "##..", "##..", ".###"),
}
OBJECTS = tuple(SPRITES)
OBJECTS_OF = {"in": OBJECTS[:4], "out": OBJECTS[4:]}
BACKGROUNDS_OF = {"in": ("grating",), "out": ("checkers", "blobs")}

Frames = NDArray[np.uint8]
Cells = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Board:
    """Sizes of a clip.

    Attributes:
        cells: along each side of the square board.
        frames: of a clip; the object moves ``frames - 1`` steps.
    """

    cells: int
    frames: int

    @property
    def pixels(self) -> int:
        """Along each side."""
        return CELL * self.cells


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip with everything about it known.

    Attributes:
        key: the clip's name, unique in a run.
        law: the direction of the first step, a key of :data:`DIRECTIONS`.
        object: a key of :data:`SPRITES`.
        path_T2: row and column of the object's cell in each frame.
        background_HWC: uint8 pixels without the object.
        colour_C: the object's colour, uint8.
    """

    key: str
    law: str
    object: str
    path_T2: Cells
    background_HWC: Frames
    colour_C: Frames

    @property
    def caption(self) -> str:
        """Names the law, and no more."""
        return f"the object moves {self.law}"

    @property
    def frames_THWC(self) -> Frames:
        """The true clip, uint8."""
        return np.stack([self.draw(cell_2) for cell_2 in self.path_T2])

    def draw(self, place_2: Sequence[float] | NDArray[Any]) -> Frames:
        """The picture with the object at that row and column of cells, or between them on a whole pixel."""
        picture_HWC = self.background_HWC.copy()
        row, column = (round(CELL * float(place)) for place in place_2)
        picture_HWC[row : row + CELL, column : column + CELL][sprite_mask(self.object)] = self.colour_C
        return picture_HWC


def make_clip(board: Board, domain: str, seed: int, key: str) -> Clip:
    """Draw a clip; it depends on (board, domain, seed, key) alone."""
    rng = np.random.default_rng(keyed_seed(seed, "world", domain, key))
    law = LAWS[rng.integers(len(LAWS))]
    name = OBJECTS_OF[domain][rng.integers(len(OBJECTS_OF[domain]))]
    kind = BACKGROUNDS_OF[domain][rng.integers(len(BACKGROUNDS_OF[domain]))]
    background_HWC = draw_background(kind, board.pixels, rng)
    return Clip(
        key=key,
        law=law,
        object=name,
        path_T2=bounce(_start(board, law, rng), law, board),
        background_HWC=background_HWC,
        colour_C=_colour(_hue(rng), rng.uniform(0.7, 1.0), rng.uniform(0.9, 1.0)),
    )


def bounce(start_2: Sequence[int], law: str, board: Board) -> Cells:
    """Cells of the object in each frame: one step a frame, reflected at the walls axis by axis."""
    last = board.cells - 1
    steps_T = np.arange(board.frames)
    path = [
        last - np.abs((place + step * steps_T) % (2 * last) - last)
        for place, step in zip(start_2, DIRECTIONS[law], strict=True)
    ]
    return np.stack(path, axis=1).astype(np.int64)


def path_length(path_T2: Cells) -> int:
    """Cells travelled, counted as a king's moves."""
    return int(np.abs(np.diff(path_T2, axis=0)).max(1).sum())


def track(clip: Clip, frames_THWC: Frames) -> tuple[Cells, NDArray[np.bool_]]:
    """Cell in each frame that looks most like the clip's object over the clip's background.

    Args:
        clip: whose object and background are looked for.
        frames_THWC: of a sample that starts from the clip's picture, uint8.

    Returns:
        Row and column ``[T, 2]``: where drawing the object explains the picture best, in squared error. And ``[T]``:
        whether it explains it better there than the background alone; else the object is not to be seen.
    """
    cells = clip.background_HWC.shape[0] // CELL
    difference = frames_THWC.astype(np.float64) - clip.background_HWC
    mask = np.tile(sprite_mask(clip.object), (cells, cells))
    drawn_HWC = np.where(mask[..., None], clip.colour_C.astype(np.float64) - clip.background_HWC, 0.0)
    # |x - background|^2 - |x - with object|^2, summed over each cell.
    gain_THW = (2 * difference * drawn_HWC - drawn_HWC**2).sum(-1)
    gain_Trc = gain_THW.reshape(len(frames_THWC), cells, CELL, cells, CELL).sum((2, 4))
    gain_TK = gain_Trc.reshape(len(frames_THWC), -1)
    return np.stack(np.divmod(gain_TK.argmax(1), cells), axis=1), gain_TK.max(1) > 0


def draw_background(kind: str, pixels: int, rng: np.random.Generator) -> Frames:
    """A dim pattern of two shades, uint8 ``[H, W, C]``."""
    rows, columns = np.mgrid[:pixels, :pixels].astype(np.float64)
    if kind == "grating":
        angle, length = rng.uniform(0, np.pi), rng.uniform(5, 12)
        phase = (rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / length + rng.uniform(0, 2 * np.pi)
        weight = 0.5 + 0.5 * np.sin(phase)
    elif kind == "checkers":
        side, (first, second) = rng.integers(2, 6), rng.integers(0, 6, 2)
        weight = ((rows + first) // side + (columns + second) // side) % 2
    else:
        centres = rng.uniform(0, pixels, (4, 2))
        weight = sum(
            np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * (pixels / 8) ** 2)) for row, column in centres
        )
        weight = np.clip(weight, 0, 1)
    dark, light = (
        _colour(_hue(rng), rng.uniform(0.2, 0.6), value) for value in (rng.uniform(0.05, 0.2), 0.45)
    )
    return (dark + (light.astype(np.float64) - dark) * np.asarray(weight)[..., None]).round().astype(np.uint8)


def sprite_mask(name: str) -> NDArray[np.bool_]:
    """Pixels of a cell that an object covers."""
    return np.array([[mark == "#" for mark in line] for line in SPRITES[name]])


def _start(board: Board, law: str, rng: np.random.Generator) -> tuple[int, ...]:
    """A cell from which the first step hits no wall, so that the clip shows the law's name."""
    return tuple(int(rng.integers(max(0, -step), board.cells - max(0, step))) for step in DIRECTIONS[law])


def _hue(rng: np.random.Generator) -> float:
    """Red to cyan. A domain of other hues is more than models of this size bear: see the record in README.md."""
    return rng.uniform(0.0, 0.5)


def _colour(hue: float, saturation: float, value: float) -> Frames:
    return (255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))).round().astype(np.uint8)
