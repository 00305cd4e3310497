"""The world of examples/paradigms: its laws, what is seen of them, and pixels as latents."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.evaluation.videos import read_frames
from megatron_flashi2v.sampling.pipeline import to_frames

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

from paradigms.footage import smooth_frames, write_footage
from paradigms.pixels import LawRows, PixelVAE, clip_latents, write_shards
from paradigms.world import (
    BACKGROUNDS_OF,
    CELL,
    DIRECTIONS,
    DOMAINS,
    OBJECTS_OF,
    SPRITES,
    Board,
    Clip,
    bounce,
    make_clip,
    path_length,
    track,
)

BOARD = Board(cells=5, frames=8)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(BOARD, domain, 3, f"{domain}-{number}") for domain in DOMAINS for number in range(60)]


def walked(start: tuple[int, int], law: str, board: Board) -> list[list[int]]:
    """Cell by cell: a step that would leave the board turns round first."""
    place, step, path = list(start), list(DIRECTIONS[law]), [list(start)]
    for _ in range(board.frames - 1):
        for axis in (0, 1):
            if not 0 <= place[axis] + step[axis] < board.cells:
                step[axis] = -step[axis]
            place[axis] += step[axis]
        path.append(list(place))
    return path


def test_the_object_bounces() -> None:
    for law in DIRECTIONS:
        for start in np.ndindex(BOARD.cells, BOARD.cells):
            assert bounce(start, law, BOARD).tolist() == walked(start, law, BOARD), (law, start)


def test_picture_and_caption_decide_the_clip(clips: list[Clip]) -> None:
    assert {clip.law for clip in clips} == set(DIRECTIONS)
    for clip in clips:
        assert clip.path_T2.tolist() == walked(tuple(clip.path_T2[0].tolist()), clip.caption.split()[-1], BOARD)
        # The first step is the caption's, not a bounce.
        assert tuple(clip.path_T2[1] - clip.path_T2[0]) == DIRECTIONS[clip.law]


def test_a_clip_depends_on_its_key_alone() -> None:
    one, again, other = (make_clip(BOARD, "in", 3, key).frames_THWC for key in ("a", "a", "b"))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_domains_share_hues_and_no_object_or_background(clips: list[Clip]) -> None:
    assert not set(OBJECTS_OF["in"]) & set(OBJECTS_OF["out"])
    assert not set(BACKGROUNDS_OF["in"]) & set(BACKGROUNDS_OF["out"])
    assert set(SPRITES) == {*OBJECTS_OF["in"], *OBJECTS_OF["out"]}
    for domain, part in zip(DOMAINS, (clips[:60], clips[60:]), strict=True):
        assert {clip.object for clip in part} == set(OBJECTS_OF[domain])
        for clip in part:
            red, green, blue = clip.colour_C.astype(int)
            assert blue <= max(red, green), "from red to cyan"


def test_the_tracker_finds_the_true_path(clips: list[Clip]) -> None:
    noise = np.random.default_rng(0)
    for clip in clips:
        frames = clip.frames_THWC
        path_T2, seen_T = track(clip, frames)
        assert np.array_equal(path_T2, clip.path_T2) and seen_T.all()
        noisy = np.clip(frames + noise.normal(0, 15, frames.shape), 0, 255).astype(np.uint8)
        assert np.array_equal(track(clip, noisy)[0], clip.path_T2)
        frozen = np.repeat(frames[:1], len(frames), axis=0)
        assert path_length(track(clip, frozen)[0]) == 0 < path_length(clip.path_T2) == BOARD.frames - 1
        empty = np.repeat(clip.background_HWC[None], len(frames), axis=0)
        assert not track(clip, empty)[1].any()


def test_latents_are_the_pixels(clips: list[Clip]) -> None:
    latents = torch.stack([clip_latents(clip) for clip in clips])
    assert latents.shape == (120, *PixelVAE().latent_shape(8, 20, 20)) == (120, 12, 8, 10, 10)
    assert np.array_equal(to_frames(PixelVAE().decode(latents)), np.stack([clip.frames_THWC for clip in clips]))
    assert abs(latents.mean()) < 0.3 and 0.7 < latents.std() < 1.3, "the noise's scale"


def test_each_law_has_its_row() -> None:
    encoder = LawRows()
    rows = torch.cat(encoder.encode([f"the object moves {law}" for law in DIRECTIONS] + [""]))
    assert torch.equal(rows @ rows.T, 16 * torch.eye(9))
    with pytest.raises(ConfigError, match="names 0 of the laws"):
        encoder.encode(["the object rests"])


def test_shards_are_a_prepared_data_set(tmp_path: Path, clips: list[Clip]) -> None:
    write_shards(tmp_path, clips[:70], BOARD)
    data = PreparedDataset(tmp_path)
    assert len(data) == 70 and data.info.temporal_stride == 1
    for number in (0, 69):
        assert torch.equal(data[number].latents_CTHW, clip_latents(clips[number]))
        assert data[number].caption == clips[number].caption and data[number].key == clips[number].key


def test_footage_moves_between_the_cells(tmp_path: Path) -> None:
    board = Board(cells=4, frames=3)
    clip = make_clip(board, "in", 0, "train-0000")
    frames = smooth_frames(clip, 4)
    assert len(frames) == 9 and np.array_equal(frames[::4], clip.frames_THWC)
    row, column = (CELL * clip.path_T2[0] + np.array(DIRECTIONS[clip.law])).tolist()  # a pixel on
    mask = np.array([[mark == "#" for mark in line] for line in SPRITES[clip.object]])
    assert (frames[1, row : row + CELL, column : column + CELL][mask] == clip.colour_C).all()

    write_footage(tmp_path, board, {"train": 2, "trained": 1, "held": 1, "out": 1}, frames_per_step=4, enlarge=4)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        "train-0000.mp4", "train-0000.txt", "train-0001.mp4", "train-0001.txt",
    ]  # fmt: skip
    read = read_frames(tmp_path / "trained" / "train-0000.mp4").numpy()
    wanted = frames.repeat(4, axis=1).repeat(4, axis=2).astype(float)
    assert read.shape == wanted.shape and np.abs(read - wanted).mean() < 12  # a lossy file
    assert (tmp_path / "held" / "held-0000.txt").read_text().startswith("the object moves ")
