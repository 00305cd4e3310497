"""``.pt``, ``.pth`` and torch's distributed checkpoints: what they hold, and what they must not get to do."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.checkpoints import ODD, names, tensors_of

from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.config.errors import CheckpointError, UserError
from megatron_flashi2v.conversion.convert import convert, open_weights
from megatron_flashi2v.conversion.restricted_pickle import load_restricted
from megatron_flashi2v.conversion.torch_archive import open_torch_archive
from megatron_flashi2v.conversion.torch_distributed_checkpoint import open_distributed
from megatron_flashi2v.conversion.weights import ReadOptions

FLAGS = ReadOptions(num_attention_heads=3, phi_order="repeat_then_conv")


def external(column: str = "flashi2v_npu", scale: float = 1.0) -> dict[str, torch.Tensor]:
    ours = tensors_of(ODD)
    return {
        name: (tensor * scale).clone()
        for entry in mappings(ODD, column)
        for name, tensor in zip(entry.external, entry.to_external(ours[entry.ours]), strict=True)
    }


def with_extra_state(tensors: dict[str, torch.Tensor]) -> OrderedDict[str, object]:
    """As megatron's linears leave it in a state dict."""
    held: OrderedDict[str, object] = OrderedDict(tensors)
    for name in tensors:
        if name.endswith("proj_q.weight"):
            held[name.replace("weight", "_extra_state")] = None
        elif name.endswith("proj_k.weight"):
            held[name.replace("weight", "_extra_state")] = torch.empty(0, dtype=torch.uint8)
    held._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as nn.Module.state_dict() does
    return held


def assert_holds(path: Path, name: str, expected: dict[str, torch.Tensor], weights: str = "model") -> None:
    options = ReadOptions(num_attention_heads=3, phi_order="repeat_then_conv", weights=weights)
    found = open_weights(name, path, options)
    assert found.config.to_json() == {**ODD.to_json(), "text_length": 512, "text_cleaning": "light", "norm_eps": 1e-6}
    column = "flashi2v_npu" if name == "flashi2v-npu" else "wan"
    for entry in mappings(ODD, column):
        parts = entry.to_external(found.read(entry.ours))
        assert all(torch.equal(part, expected[key]) for key, part in zip(entry.external, parts, strict=True))


@pytest.mark.parametrize("under", ["", "model", "state_dict", "module"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_state_dicts_as_training_code_leaves_them(tmp_path: Path, under: str, suffix: str) -> None:
    tensors = external()
    held: object = with_extra_state(tensors)
    path = tmp_path / f"a{suffix}"
    torch.save({under: held, "iteration": 3, "args": {"lr": [1e-4]}} if under else held, path)
    assert_holds(path, "flashi2v-npu", tensors)
    left_out = open_weights("flashi2v-npu", path, FLAGS).left_out
    assert len([name for name in left_out if name.endswith("_extra_state")]) == 8
    assert ("iteration" in left_out) == bool(under)


def test_both_sets_in_one_file_and_in_two(tmp_path: Path) -> None:
    model, ema = external("wan"), external("wan", 0.5)
    torch.save({"ema_model": ema, "model": model}, tmp_path / "both.pt")
    torch.save({"ema_model": ema}, tmp_path / "only.pt")
    (tmp_path / "iter_000001000").mkdir()
    torch.save(model, tmp_path / "iter_000001000" / "model_state_dict.pt")
    torch.save(ema, tmp_path / "iter_000001000" / "ema_model_state_dict.pt")
    torch.save(model, tmp_path / "model.pt")
    for path in (tmp_path / "both.pt", tmp_path / "iter_000001000"):
        assert_holds(path, "flashi2v-gpu", model)
        assert_holds(path, "flashi2v-gpu", ema, "ema")
    assert_holds(tmp_path / "only.pt", "flashi2v-gpu", ema)
    torch.save(ema, tmp_path / "flashi2v.ema")
    assert_holds(tmp_path / "flashi2v.ema", "flashi2v-gpu", ema, "ema")
    assert "EMA weights only" in open_weights("flashi2v-gpu", tmp_path / "only.pt", FLAGS).notes[0]
    with pytest.raises(UserError, match="model.pt holds no EMA weights; leave out --weights ema"):
        open_weights("flashi2v-gpu", tmp_path / "model.pt", ReadOptions(weights="ema", num_attention_heads=3))


def test_tied_scalar_transposed_and_parameter_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    held = {
        "tied": base, "again": base, "rows": base[1:3], "transposed": base.T, "scalar": torch.tensor(2.5),
        "number": torch.tensor(7), "empty": torch.empty(0, 3), "parameter": torch.nn.Parameter(base.bfloat16()),
        "flags": torch.tensor([True, False]), "nested": {"deep": base.double()}, "spread": torch.ones(1).expand(5),
    }  # fmt: skip
    torch.save(held, tmp_path / "a.pt")
    found, others = open_torch_archive(tmp_path / "a.pt")
    assert not others and found.keys() == (held.keys() - {"nested"}) | {"nested.deep"}
    for name, tensor in found.items():
        expected = held["nested"]["deep"] if name == "nested.deep" else held[name]
        assert tensor.dtype == expected.dtype and tensor.shape == tuple(expected.shape), name
        assert torch.equal(tensor.read(), expected) and tensor.read().is_contiguous(), name
    assert torch.equal(found["transposed"].read((slice(1, 3), slice(0, 2))), base.T[1:3, :2])
    dcp.save({name: value for name, value in held.items() if name not in ("nested", "spread")},
             checkpoint_id=tmp_path / "dcp", no_dist=True)  # fmt: skip
    tensors, others = open_distributed(tmp_path / "dcp")
    for name, tensor in tensors.items():
        assert torch.equal(tensor.read(), held[name]) and tensor.dtype == held[name].dtype, name
    assert torch.equal(tensors["transposed"].read((slice(1, 3), slice(0, 2))), base.T[1:3, :2])
    assert len(tensors) == len(held) - 2


def test_distributed_checkpoint_of_one_process(tmp_path: Path) -> None:
    model, ema = external("wan"), external("wan", 0.5)
    dcp.save(
        {"model": model, "ema_model": ema, "optim": {"step": torch.tensor(3), "lr": 0.1}},
        checkpoint_id=tmp_path / "dcp", no_dist=True,
    )  # fmt: skip
    assert (tmp_path / "dcp" / ".metadata").is_file()
    assert_holds(tmp_path / "dcp", "flashi2v-gpu", model)
    assert_holds(tmp_path / "dcp", "flashi2v-gpu", ema, "ema")
    left_out = open_weights("flashi2v-gpu", tmp_path / "dcp", FLAGS).left_out
    assert {"optim.step", "optim.lr"} <= set(left_out)


SHARDED = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import distribute_tensor, init_device_mesh, Shard, Replicate
from megatron_flashi2v.runtime.distributed import shutdown
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
state = torch.load(sys.argv[1], weights_only=True)
kinds = [Shard(0), Replicate(), Shard(1)]
state = {
    name: distribute_tensor(value, mesh, [kinds[index % 3] if value.dim() > 1 else kinds[index % 2]])
    for index, (name, value) in enumerate(state.items())
}
dcp.save(state, checkpoint_id=sys.argv[2])
shutdown()
"""


def test_distributed_checkpoint_of_two_ranks(tmp_path: Path) -> None:
    """Tensors in chunks of rows or columns, uneven ones among them (widths of 15 and 11 halves)."""
    tensors = external("wan")
    torch.save(tensors, tmp_path / "plain.pt")
    (tmp_path / "shard.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "shard.py"), str(tmp_path / "plain.pt"), str(tmp_path / "dcp")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    assert_holds(tmp_path / "dcp", "flashi2v-gpu", tensors)
    found, _ = open_distributed(tmp_path / "dcp")
    name = "blocks.0.ffn.0.weight"
    assert torch.equal(found[name].read((slice(9, 13), slice(13, 29))), tensors[name][9:13, 13:29])


class Payload:
    """Runs on being unpickled: writes a file."""

    def __init__(self, mark: Path, how: str) -> None:
        self.mark, self.how = str(mark), how

    def __reduce__(self) -> tuple[object, ...]:
        if self.how == "exec":
            return exec, (f"open({self.mark!r}, 'w').close()",)
        return os.system, (f"touch {self.mark}",)


def malicious_archive(path: Path, mark: Path, how: str) -> None:
    torch.save({"patch_embedding.weight": torch.ones(1), "x": Payload(mark, how)}, path)


def malicious_metadata(path: Path, mark: Path, how: str) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(Payload(mark, how)))


def malicious_bare_pickle(path: Path, mark: Path, how: str) -> None:
    path.write_bytes(pickle.dumps({"patch_embedding.weight": Payload(mark, how)}))


def malicious_old_format(path: Path, mark: Path, how: str) -> None:
    torch.save({"x": Payload(mark, how)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("how", ["exec", "system"])
@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (malicious_archive, "a.pt", "a.pt is refused: its pickle needs (__builtin__.exec|builtins.exec|posix.*)"),
        (malicious_archive, "a.pth", "a.pth is refused: its pickle needs"),
        (malicious_metadata, "dcp", ".metadata is refused: its pickle needs (__builtin__.exec|builtins.exec|posix.*)"),
        (malicious_bare_pickle, "a.pt", "a.pt is not a whole torch archive"),
        (malicious_old_format, "a.pth", "a.pth is not a whole torch archive"),
    ],
)
def test_no_code_of_a_pickle_runs(
    tmp_path: Path, make: Callable[[Path, Path, str], None], name: str, words: str, how: str
) -> None:
    mark = tmp_path / "mark"
    make(tmp_path / name, mark, how)
    for source in ("wan", "flashi2v-npu", "flashi2v-gpu"):
        with pytest.raises(CheckpointError, match=words):
            convert((source, tmp_path / name), ("megatron", tmp_path / "out"), num_attention_heads=3)
    assert not mark.exists() and names(tmp_path) == {name}
    # The payload is live: what we do not do would have run it.
    if make in (malicious_bare_pickle, malicious_metadata):
        data = (tmp_path / name / ".metadata" if make is malicious_metadata else tmp_path / name).read_bytes()
        pickle.loads(data)  # noqa: S301
        assert mark.exists()


def test_a_pickle_cannot_reach_through_the_stand_ins() -> None:
    """Names behind dots, classes of Python's own, and attributes set on what it is given."""
    allowed = (("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2"))
    attempts = [
        b"\x80\x04\x8c\x05torch\x8c\x0bos.path.abc\x93.",  # STACK_GLOBAL of a dotted name
        b"cbuiltins\ngetattr\n.",
        b"ctorch\nload\n.",
        b"ctorch.os\nsystem\n.",
        b"ctorch\nSize\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb.",  # BUILD on the stand-in itself
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x04Pid\n.",
    ]
    for data in attempts:
        with pytest.raises(CheckpointError):
            load_restricted(data, allowed, source=Path("x.pt"))
    record = load_restricted(b"ctorch\nSize\n((I3\nttR.", allowed, source=Path("x.pt"))
    assert (record.name, record.arguments) == ("Size", ((3,),))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"x": torch.ones(3).to_sparse()}, "needs torch._utils._rebuild_sparse_tensor"),
        ({"x": torch.ones(3, dtype=torch.complex64)}, "needs torch.ComplexFloatStorage"),
        ({"args": Path("x")}, "needs pathlib.*Path"),
        ({"x": torch.float8_e4m3fn}, "needs torch.float8_e4m3fn"),
    ],
)
def test_what_is_not_plain_tensors_is_refused_by_name(tmp_path: Path, value: object, words: str) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=words):
        open_torch_archive(tmp_path / "a.pt")


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "a.pt is not a whole torch archive"),
        (lambda path: path.write_bytes(b""), "a.pt is not a whole torch archive"),
        (lambda path: rewritten(path, lambda name, data: data[:-4] if "data/0" in name else data), "says another size"),
        (lambda path: rewritten(path, lambda name, data: b"big" if "byteorder" in name else data), "big-endian"),
        (lambda path: rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda path: rewritten(path, lambda name, data: b"\x80\x02" if "data.pkl" in name else data), "is damaged"),
        (lambda path: path.unlink() or zipfile.ZipFile(path, "w").close(), "without a data.pkl"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_damaged_archives_are_named(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    torch.save(external(), tmp_path / "a.pt")
    damage(tmp_path / "a.pt")
    with pytest.raises(UserError, match=words):
        convert(("flashi2v-npu", tmp_path / "a.pt"), ("megatron", tmp_path / "out"), num_attention_heads=3)
    assert names(tmp_path) <= {"a.pt"}


def test_a_view_past_its_storage_is_refused(tmp_path: Path) -> None:
    """What would read other memory; torch.save cannot write it, so the description is edited."""
    torch.save({"x": torch.arange(7.0)}, tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda name, data: data.replace(b"K\x07\x85", b"K\x09\x85") if "pkl" in name else data)
    with pytest.raises(CheckpointError, match=r"tensor x of shape \(9,\) reaches past the end of its storage"):
        open_torch_archive(tmp_path / "a.pt")


def edited_metadata(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / ".metadata"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "__0_0.distcp").unlink(), "is in __0_0.distcp, but there is no such file"),
        (lambda f: edited_metadata(f, lambda data: data.replace(b"__0_0.distcp", b"../_0.distcp")), "not a plain file"),
        (lambda f: (f / "__0_0.distcp").write_bytes((f / "__0_0.distcp").read_bytes()[:2000]), "cut short|archive"),
        (lambda f: edited_metadata(f, lambda data: data[:200]), "metadata: its pickled description is damaged"),
        (lambda f: edited_metadata(f, lambda data: pickle.dumps({})), "holds no metadata of torch"),
    ],
)
def test_damaged_distributed_checkpoints_are_named(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    dcp.save(external("wan"), checkpoint_id=tmp_path / "dcp", no_dist=True)
    damage(tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=words):
        convert(("flashi2v-gpu", tmp_path / "dcp"), ("megatron", tmp_path / "out"), num_attention_heads=3)
    assert names(tmp_path) == {"dcp"}


def test_several_files_need_a_name(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(external("wan"), tmp_path / name)
    with pytest.raises(CheckpointError, match="holds a.pt, b.pt; name the file to read"):
        open_weights("wan", tmp_path, FLAGS)
    (tmp_path / "notes.txt").write_text("")
    for path, words in ((tmp_path / "notes.txt", "is no file of weights"), (tmp_path / "x", "does not exist")):
        with pytest.raises(CheckpointError, match=words):
            open_weights("wan", path, FLAGS)
    torch.save({"x": torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="holds no tensor patch_embedding.weight, but 1 others"):
        open_weights("wan", tmp_path / "c.pt", FLAGS)


def test_an_archive_is_read_without_torch_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    torch.save(external("wan"), buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    assert_holds(tmp_path / "a.pt", "wan", external("wan"))
