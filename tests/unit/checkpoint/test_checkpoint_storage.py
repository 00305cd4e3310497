"""Sharded storage: from any layout to any other, and nothing wrong gets through."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import read_full
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from megatron_flashi2v.checkpoint import storage
from megatron_flashi2v.checkpoint.index import write_index
from megatron_flashi2v.checkpoint.manifest import verify, write_manifest
from megatron_flashi2v.checkpoint.storage import (
    TensorPiece,
    merge_parts,
    read_pieces,
    write_rank_file,
)
from megatron_flashi2v.config.errors import CheckpointError

Box = tuple[tuple[int, ...], tuple[int, ...]]

TENSORS = {
    "a": torch.randn(12, 10),
    "b": torch.randn(7),
    "c": torch.randn(4, 3, 2, 5).to(torch.bfloat16),
    "d": torch.tensor(3.5, dtype=torch.float64),
    "e": torch.arange(30, dtype=torch.int64).reshape(5, 6),
}


def random_boxes(shape: tuple[int, ...], count: int) -> list[Box]:
    """Cut a shape into up to ``count`` boxes by random cuts."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(count * 3):
        if len(boxes) >= count or not shape:
            break
        offset, size = boxes.pop(random.randrange(len(boxes)))
        axis = random.randrange(len(shape))
        if size[axis] < 2:
            boxes.append((offset, size))
            continue
        cut = random.randrange(1, size[axis])
        second_offset = (*offset[:axis], offset[axis] + cut, *offset[axis + 1 :])
        boxes.append((offset, (*size[:axis], cut, *size[axis + 1 :])))
        boxes.append((second_offset, (*size[:axis], size[axis] - cut, *size[axis + 1 :])))
    return boxes


def random_layout(world: int, *, fill: bool) -> list[list[TensorPiece]]:
    """Every tensor cut into random boxes and stretches, dealt out to ranks; data of zeros without
    ``fill``."""
    ranks: list[list[TensorPiece]] = [[] for _ in range(world)]
    for key, tensor in TENSORS.items():
        for offset, shape in random_boxes(tuple(tensor.shape), random.randrange(1, 5)):
            box = tensor[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
            cuts: list[tuple[int, int] | None] = [None]
            if random.random() < 0.6:
                inner = sorted(random.sample(range(box.numel() + 1), min(2, box.numel())))
                edges = [0, *inner, box.numel()]
                cuts = list(zip(edges, edges[1:], strict=False))
            for cut in cuts:
                data = box.clone() if cut is None else box.reshape(-1)[cut[0] : cut[1]].clone()
                ranks[random.randrange(world)].append(
                    TensorPiece(
                        key=key,
                        global_shape=tuple(tensor.shape),
                        offset=offset,
                        shape=shape,
                        flat_range=cut,
                        data=data if fill else torch.zeros_like(data),
                    )
                )
    return ranks


def write_layout(folder: Path, layout: list[list[TensorPiece]]) -> None:
    """What the ranks of a job do together, one after the other in this process."""
    folder.mkdir(exist_ok=True)
    parts = [
        write_rank_file(folder, pieces, rank=rank, world_size=len(layout))
        for rank, pieces in enumerate(layout)
    ]
    write_index(folder, merge_parts(parts))


@pytest.mark.parametrize("seed", range(12))
def test_any_layout_to_any_other(tmp_path: Path, seed: int) -> None:
    random.seed(seed)
    write_layout(tmp_path, random_layout(random.randrange(1, 5), fill=True))
    write_manifest(tmp_path, ())
    verify(tmp_path)
    assert storage.keys(tmp_path) == tuple(TENSORS)
    for key, tensor in TENSORS.items():
        assert torch.equal(read_full(tmp_path, key), tensor)
    wanted = [piece for rank in random_layout(3, fill=False) for piece in rank]
    read_pieces(tmp_path, wanted)
    for piece in wanted:
        box = TENSORS[piece.key][
            tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shape, strict=True))
        ]
        expected = box if piece.flat_range is None else box.reshape(-1)[slice(*piece.flat_range)]
        assert torch.equal(piece.data, expected), piece


def test_no_other_reader_takes_a_part_for_the_whole(tmp_path: Path) -> None:
    """torch's reader of safetensors knows names and shapes alone: a tensor's own name is that of a whole one."""
    random.seed(5)
    layout = random_layout(3, fill=True)
    layout[1].append(TensorPiece.whole("whole", TENSORS["a"]))
    write_layout(tmp_path, layout)
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    names = [name for file in files for name in file]
    assert len(files) == 3 and len(names) == len(set(names)) and "whole" in names and "a" not in names
    known = HuggingFaceStorageReader(str(tmp_path)).read_metadata().state_dict_metadata
    for name in known.keys() & TENSORS.keys():
        assert known[name].size == TENSORS[name].shape


def test_reading_fills_views_and_parameters_in_place(tmp_path: Path) -> None:
    write_layout(tmp_path, [[TensorPiece.whole("a", TENSORS["a"])]])
    buffer = torch.zeros(200)
    parameter = torch.nn.Parameter(buffer[5:65].view(6, 10))
    read_pieces(
        tmp_path, [TensorPiece(key="a", global_shape=(12, 10), offset=(6, 0), shape=(6, 10), data=parameter)]
    )
    assert torch.equal(buffer[5:65].view(6, 10), TENSORS["a"][6:])
    assert not buffer[:5].any() and not buffer[65:].any()


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    write_layout(tmp_path, [[TensorPiece.whole("a", TENSORS["a"]), TensorPiece.whole("c", TENSORS["c"])], []])
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        "tensors-00000-of-00002.safetensors"
    ]
    loaded = load_file(tmp_path / "tensors-00000-of-00002.safetensors")
    assert set(loaded) == {"a", "c"}
    assert torch.equal(loaded["a"], TENSORS["a"]) and torch.equal(loaded["c"], TENSORS["c"])


def test_replicas_are_not_written(tmp_path: Path) -> None:
    copy = TensorPiece(key="b", global_shape=(7,), offset=(0,), shape=(7,), data=torch.zeros(7), owner=False)
    write_layout(tmp_path, [[TensorPiece.whole("b", TENSORS["b"])], [copy]])
    assert torch.equal(read_full(tmp_path, "b"), TENSORS["b"])


def row(begin: int, end: int, key: str = "a", dtype: torch.dtype = torch.float32) -> TensorPiece:
    return TensorPiece(
        key=key,
        global_shape=(12, 10),
        offset=(begin, 0),
        shape=(end - begin, 10),
        data=torch.zeros(end - begin, 10, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ([[row(0, 6)], [row(7, 12)]], "110 of 120"),
        ([[row(0, 6)], [row(5, 12)]], "overlap"),
        ([[row(0, 6)], [row(0, 6)]], "overlap"),
        ([[row(0, 6)], [row(6, 13)]], "outside"),
        ([[row(0, 6)], [row(6, 12, dtype=torch.bfloat16)]], "bfloat16"),
        ([[row(0, 6), row(6, 12, dtype=torch.bfloat16)]], "bfloat16"),
        ([[row(0, 12)], [TensorPiece.whole("a", torch.zeros(11, 10))]], "(11, 10)"),
    ],
)
def test_a_wrong_layout_never_gets_an_index(
    tmp_path: Path, layout: list[list[TensorPiece]], words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_layout(tmp_path, layout)
    assert words in str(caught.value) and "tensor a" in str(caught.value)
    assert not (tmp_path / "index.json").exists()


def test_a_piece_must_fit_its_data() -> None:
    with pytest.raises(ValueError, match="data has shape"):
        TensorPiece(key="a", global_shape=(4,), offset=(0,), shape=(4,), data=torch.zeros(3))
    with pytest.raises(ValueError, match="does not lie within"):
        TensorPiece(
            key="a", global_shape=(4,), offset=(0,), shape=(4,), flat_range=(2, 5), data=torch.zeros(3)
        )


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "index.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def truncate(folder: Path) -> None:
    path = folder / "tensors-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def truncate_unnoticed_by_the_index(folder: Path) -> None:
    truncate(folder)
    size = (folder / "tensors-00000-of-00001.safetensors").stat().st_size
    edit_index(folder, lambda d: d["files"]["tensors-00000-of-00001.safetensors"].update(bytes=size))


def rename_file(document: dict) -> None:
    document["files"] = {"../x.safetensors": {"bytes": 1, "sha256": ""}}
    for tensor in document["tensors"].values():
        tensor["pieces"][0]["file"] = "../x.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "bytes long"),
        (truncate_unnoticed_by_the_index, "not a whole safetensors file"),
        (lambda f: (f / "tensors-00000-of-00001.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "index.json").unlink(), "does not exist"),
        (lambda f: edit_index(f, lambda d: d["tensors"].pop("a")), "no tensor a"),
        (lambda f: edit_index(f, lambda d: d["tensors"]["a"].update(shape=[12, 11])), "(12, 11)"),
        (lambda f: edit_index(f, lambda d: d["tensors"]["a"]["pieces"][0].update(name="zz")), "tensor zz"),
        (
            lambda f: edit_index(f, lambda d: d["tensors"]["a"]["pieces"][0].update(shape=[11, 10])),
            "110 of the 120",
        ),
        (lambda f: edit_index(f, lambda d: d["tensors"]["a"].pop("dtype")), "malformed"),
        (lambda f: edit_index(f, lambda d: d["tensors"]["a"]["pieces"][0].update(file="y")), "malformed"),
        (lambda f: edit_index(f, lambda d: d.update(format_version=2)), "format_version"),
        (lambda f: edit_index(f, rename_file), "../x.safetensors"),
        (lambda f: (f / "index.json").write_text('{"format_version": 1'), "index.json"),
        (lambda f: (f / "index.json").write_text("[]"), "must hold a JSON object"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    write_layout(tmp_path, [[TensorPiece.whole("a", TENSORS["a"])]])
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_pieces(tmp_path, [TensorPiece.whole("a", torch.zeros(12, 10))])
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_wrong_shape_and_dtype(tmp_path: Path) -> None:
    write_layout(tmp_path, [[TensorPiece.whole("a", TENSORS["a"]), TensorPiece.whole("c", TENSORS["c"])]])
    with pytest.raises(CheckpointError, match=r"a has shape \(12, 10\).* needs \(12, 9\)"):
        read_pieces(tmp_path, [TensorPiece.whole("a", torch.zeros(12, 9))])
    wanted = TensorPiece.whole("c", torch.zeros(4, 3, 2, 5))
    with pytest.raises(CheckpointError, match="BF16"):
        read_pieces(tmp_path, [wanted])
    read_pieces(tmp_path, [wanted], allow_cast=True)
    assert torch.equal(wanted.data, TENSORS["c"].float())


def test_missing_tensors_may_be_reported_instead(tmp_path: Path) -> None:
    write_layout(tmp_path, [[TensorPiece.whole("a", TENSORS["a"])]])
    wanted = [TensorPiece.whole("a", torch.zeros(12, 10)), TensorPiece.whole("zz", torch.ones(2))]
    with pytest.raises(CheckpointError, match="no tensor zz"):
        read_pieces(tmp_path, wanted)
    assert read_pieces(tmp_path, wanted, strict=False) == ("zz",)
    assert torch.equal(wanted[0].data, TENSORS["a"]) and torch.equal(wanted[1].data, torch.ones(2))
