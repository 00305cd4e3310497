"""Files made to do harm: nothing in them runs, leaves their folder or fills the memory; each is refused in one line."""

from __future__ import annotations

import json
import pickle
import resource
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.damage import locate, spoil_values
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.config.errors import ConfigError, DataError, UserError
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.runtime.files import read_json, read_jsonl


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What asks for more than 16 GiB on top of what is mapped already fails."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**34, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_synthetic(tmp_path / "set", 3, (4, 2, 4, 4), 8, 6, seed=3)


def read_all(folder: Path) -> list[torch.Tensor]:
    data = PreparedDataset(folder)
    return [data[number].latents_CTHW for number in range(len(data))]


def test_members_with_hostile_names_are_never_unpacked(data: Path, tmp_path: Path) -> None:
    """Names that lead outside, links and modules: a tar of the same bytes at the same places is read as before."""
    expected = read_all(data)
    tar, _, _ = locate(data, 0)
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    content = bytearray(tar.read_bytes())
    for member, (name, kind) in zip(members, [
        ("../../../outside.safetensors", tarfile.REGTYPE), (str(tmp_path / "absolute.json"), tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("module.pth", tarfile.REGTYPE),
        ("module.pyd", tarfile.REGTYPE),
    ], strict=True):
        hostile = tarfile.TarInfo(name)
        hostile.type, hostile.size, hostile.linkname = kind, member.size, "../../../outside"
        content[member.offset : member.offset + 512] = hostile.tobuf(tarfile.USTAR_FORMAT)[:512]
    tar.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    assert all(torch.equal(found, want) for found, want in zip(read_all(data), expected, strict=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pickle_in_a_tensors_place_is_not_run(data: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(Payload(mark))
    spoil_values(data, 1, lambda latents: payload)
    with pytest.raises(DataError, match="not a safetensors file"):
        read_all(data)
    assert not mark.exists()
    pickle.loads(payload)  # noqa: S301 (it is live)
    assert mark.exists()


@pytest.mark.parametrize("claim", [2**40, 2**62, 2**64 - 1])
def test_a_tensor_file_that_claims_a_huge_header(data: Path, claim: int) -> None:
    spoil_values(data, 1, lambda latents: claim.to_bytes(8, "little") + b"{" * 64)
    with pytest.raises(DataError, match="not a safetensors file"):
        read_all(data)


def test_a_tensor_file_that_claims_a_huge_tensor(data: Path) -> None:
    header = json.dumps({"latents": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    spoil_values(data, 1, lambda latents: len(header).to_bytes(8, "little") + header)
    with pytest.raises(DataError, match="not a safetensors file"):
        read_all(data)


@pytest.mark.parametrize("change", [
    {"size": 2**45}, {"size": -1}, {"offset": -512}, {"offset": 2**63}, {"size": "1"}, {"size": 1.5}, {"crc32": None},
])
def test_an_index_that_points_anywhere(data: Path, change: dict) -> None:
    tar, index, place = locate(data, 1)
    index["samples"][place]["tensors"].update(change)
    tar.with_suffix(".json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"shard-000000\.json: not a shard's index"):
        read_all(data)


def laughs(key: str) -> str:
    """A few hundred bytes that hold one word ten thousand million times."""
    levels = ["&a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    for level in range(1, 10):
        levels.append(f"&a{level} [{', '.join([levels[-1], *[f'*a{level - 1}'] * 9])}]")
    return f"{key}: {levels[-1]}"


@pytest.mark.parametrize(("text", "words"), [
    ("lr: !!python/object/apply:pathlib.Path.touch [{mark}]", "not valid YAML"),
    ("!!python/object/new:pathlib.Path [{mark}]", "not valid YAML"),
    ("lr: !!python/name:os.system", "not valid YAML"),
    ("[" * 5000, "nested too deeply"),
    (laughs("lr"), "lr is [["),
    (laughs("data_path"), "data_path is [["),
    (laughs("bf16"), "bf16 is [["),
    (laughs("unknown"), "unknown key"),
    (laughs("? "), "not valid YAML"),
])
def test_a_recipe_made_to_do_harm(tmp_path: Path, text: str, words: str) -> None:
    mark, recipe = tmp_path / "mark", tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("{mark}", str(mark)))
    with pytest.raises(ConfigError) as refused:
        parse(TrainConfig, ["--config", str(recipe)], prog="test", description="")
    assert not mark.exists() and len(str(refused.value)) < 2000 and str(recipe) in str(refused.value)
    assert words in str(refused.value)


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_json_that_is_nested_too_deeply(tmp_path: Path, read: Callable) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000 + "\n{}\n")
    with pytest.raises(UserError, match="deep.json"):
        read(path)
