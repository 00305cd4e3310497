"""Runs that train adapters or picked tensors: what is trained, kept and saved, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.base_weights import write_base
from helpers.checkpoints import save_checkpoint
from helpers.layouts import metrics, tensors
from helpers.second_rank import SecondRank
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH
from torch import Tensor, nn

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord, read_adapter_record
from megatron_flashi2v.checkpoint.adapter_table import adapter_shapes
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.key_table import mappings, parameter_count, parameter_shapes
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.adapter import ATTENTION, AdapterConfig
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.conversion.adapters.reading import open_adapter
from megatron_flashi2v.conversion.base_fingerprint import base_fingerprint, common_fingerprint, sampled_rows
from megatron_flashi2v.conversion.convert import FORMATS, convert
from megatron_flashi2v.conversion.formats.megatron import open_weights
from megatron_flashi2v.conversion.initial_weights import open_initial_weights
from megatron_flashi2v.conversion.weights import ReadOptions
from megatron_flashi2v.models.adapters import add_adapters
from megatron_flashi2v.models.placement import fused_parts
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.load import load_stages
from megatron_flashi2v.training.state import TrainState
from megatron_flashi2v.training.watching.observer import Observer

Train = Callable[..., int]
# The small model of tests/helpers/train_command.py.
CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=LATENT_SHAPE[0],
    text_dim=TEXT_DIM, text_length=TEXT_LENGTH,
)
LORA = ("--lora-rank", 2, "--lora-alpha", 6, "--lora-targets", "self_attn", "ffn.2")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("adapters") / "base", CONFIG)


@pytest.fixture
def beside(base: Path) -> tuple[str, str]:
    return "--load-weights", f"megatron:{base.parent}"


class Keep(Observer):
    """What a run trains, and which parameters it leaves otherwise than it found them."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.buffered: set[str] = set()
        self.moved: set[str] = set()
        self.state_bytes = 0

    def between_iterations(self, state: TrainState) -> None:
        named = [named for stage in state.stages for named in stage.named_parameters()]
        if not self.start:
            self.start = {name: parameter.detach().clone() for name, parameter in named}
            self.buffered = {name for name, parameter in named if hasattr(parameter, "main_grad")}
        assert all(parameter.grad is None for name, parameter in named if name not in self.buffered)
        self.moved = {name for name, parameter in named if not torch.equal(parameter, self.start[name])}
        self.state_bytes = sum(
            piece.data.nbytes for piece in state.pieces() if piece.key.startswith(("optimizer.", "ema."))
        )


def saved(save: Path, prefix: str = "") -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors(find_checkpoint(save), prefix).items()}


def pair_names(*targets: str, rank: int = 2) -> set[str]:
    return set(adapter_shapes(CONFIG, AdapterConfig(rank=rank, alpha=1.0, targets=targets)))


@pytest.mark.parametrize("flags, trained", [
    (LORA, pair_names("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.2")),
    (("--lora-rank", 2), pair_names(*ATTENTION)),
    (("--lora-rank", 2, "--lora-targets", "cross_attn.v", "--train-only", r"head\.(head|modulation)"),
     pair_names("cross_attn.v") | {"head.linear.weight", "head.linear.bias", "head.modulation"}),
    (("--train-only", "norm3.weight"), {"blocks.0.norm_cross.weight", "blocks.1.norm_cross.weight"}),
], ids=["targets", "by default", "beside the head", "norms alone"])
@pytest.mark.parametrize("precision", [(), ("--bf16", "--use-distributed-optimizer")], ids=["fp32", "bf16"])
def test_only_what_is_trained_moves_is_kept_and_is_saved(
    train: Train, beside: tuple[str, str], tmp_path: Path, flags: tuple, trained: set[str], precision: tuple[str, ...]
) -> None:
    keep = Keep()
    run = ("--save", tmp_path, *beside, *flags, *precision, "--ema-decay", 0.5)
    assert train(*run, observers=[keep]) == 0
    assert keep.buffered == keep.moved == trained
    assert keep.start.keys() == parameter_shapes(CONFIG).keys() | {name for name in trained if "lora" in name}
    assert len({row["loss"] for row in metrics(tmp_path)}) == 4
    for prefix in ("model.", "ema.", "optimizer.exp_avg.", "optimizer.exp_avg_sq."):
        assert saved(tmp_path, prefix).keys() == trained


def test_pairs_start_as_the_base_and_by_peft_s_rule(train: Train, beside: tuple[str, str], tmp_path: Path) -> None:
    keep = Keep()
    assert train(*beside, *LORA, "--train-iters", 1, observers=[keep]) == 0
    pairs = {name: value for name, value in keep.start.items() if "adapter" in name}
    for name, value in pairs.items():
        bound = value.shape[1] ** -0.5
        if name.endswith("lora_B.weight"):
            assert not value.any()
        else:
            assert 0.8 * bound < value.abs().max() <= bound
    assert len({float(value.sum()) for name, value in pairs.items() if "lora_A" in name}) == len(pairs) // 2


def test_a_killed_run_goes_on_bit_for_bit(train: Train, beside: tuple[str, str], tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    flags = (*beside, *LORA, "--bf16", "--ema-decay", 0.5, "--train-only", "phi")
    assert train("--save", straight, "--save-interval", 2, *flags) == 0
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "iter_0000004")
    (killed / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert train("--save", killed, *flags) == 0
    found, expected = saved(killed), saved(straight)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert [row["loss"] for row in metrics(killed)] == [row["loss"] for row in metrics(straight)]


def test_the_checkpoint_says_what_it_is(train: Train, base: Path, beside: tuple[str, str], tmp_path: Path) -> None:
    assert train("--save", tmp_path, *beside, *LORA, "--train-only", "phi", "--train-iters", 2) == 0
    folder = find_checkpoint(tmp_path)
    values = json.loads((folder / "adapter.json").read_text())
    weights = open_weights(base, ReadOptions())
    assert values == {
        "rank": 2, "alpha": 6.0, "targets": ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.2"],
        "trained": [name for name in parameter_shapes(CONFIG) if "phi" in name], "train_only": "phi",
        "base": f"megatron:{base}",
        "base_weights": "model", "base_fingerprint": base_fingerprint(weights),
    }
    pairs = open_adapter(folder).pairs
    assert len(pairs) == 2 * 5
    a, b = (matrix.read() for matrix in pairs["blocks.1.self_attn.v"].tensors)
    stored = saved(tmp_path, "model.blocks.1.self_attention.linear_qkv.adapter.v.")
    assert torch.equal(a, stored["lora_A.weight"]) and torch.equal(b, stored["lora_B.weight"])
    with pytest.raises(CheckpointError, match=(
        f"holds no whole model.*: flashi2v convert --from megatron {base} --adapter {folder} --merge --to megatron OUT"
    )):
        open_weights(tmp_path, ReadOptions())
    (folder / "adapter.json").write_text(json.dumps({**values, "alpha": 5.0}))
    with pytest.raises(CheckpointError, match="adapter.json is damaged"):
        find_checkpoint(folder)


def test_one_model_has_one_fingerprint_in_every_format(base: Path, tmp_path: Path) -> None:
    convert(("megatron", base), ("flashi2v-gpu", tmp_path / "gpu"))
    convert(("megatron", base), ("diffusers", tmp_path / "bf16"), dtype=torch.bfloat16)
    prints = [
        base_fingerprint(FORMATS[name].open(path, ReadOptions(assume=CONFIG)))
        for name, path in (("megatron", base), ("flashi2v-gpu", tmp_path / "gpu"), ("diffusers", tmp_path / "bf16"))
    ]
    other = base_fingerprint(open_weights(write_base(tmp_path / "other", CONFIG, seed=6), ReadOptions()))
    assert prints[0] == prints[1] and len({*prints, other}) == 3


def test_another_base_is_refused(
    train: Train, beside: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train("--save", run, *beside, *LORA, "--exit-interval", 2) == 0
    before = saved(run)
    write_base(tmp_path / "other", CONFIG, seed=6)
    for given, words in (
        (("--load-weights", f"megatron:{tmp_path / 'other'}", *LORA), "trained beside other weights than"),
        ((*beside, *LORA[:2], "--lora-alpha", 5, *LORA[4:]), "--lora-alpha 6.0 .* and this run has .*--lora-alpha 5.0"),
        ((*beside, *LORA, "--train-only", "phi"), "and this run has .* tensors .* trained whole"),
        ((), r"trained a part of the weights of megatron:.*; give --lora-rank 2 --lora-alpha 6.0 --lora-targets self"
         r"[^;]* ffn.2 --load-weights megatron:\S+base/iter_0000000$"),
    ):
        assert train("--save", run, *given) != 0
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(words, error), error
        assert len(metrics(run)) == 2 and saved(run).keys() == before.keys()
    full = tmp_path / "full"
    assert train("--save", full, "--exit-interval", 1) == 0
    capsys.readouterr()
    assert train("--save", full, *beside, *LORA) != 0
    assert "trained all weights; to train a part of them, start a new run with" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (("--lora-rank", 2, "--lora-targets", "q", "k_img"),
     "--lora-targets k_img names no linear of this model; choose from self_attn.q, .* or all"),
    (("--train-only", r"self_attn\.(q|k)\.weight"),
     r"finds blocks.0.self_attn.q.weight, blocks.0.self_attn.k.weight, which is one tensor with "
     r"blocks.0.self_attn.v.weight here \(blocks.0.self_attention.linear_qkv.weight\)"),
    (("--train-only", "fi"), "'fi' is found in no tensor's name; names are ours, such as"),
    (("--train-only", "", "--lora-rank", 2), "--train-only '' is found in all .* names and leaves nothing frozen"),
])
def test_what_is_not_there_is_refused(
    train: Train, beside: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple, words: str
) -> None:
    """Before --fresh sets anything aside."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train("--save", tmp_path / "run", "--fresh", *beside, *flags) == 2
    assert re.search(words, capsys.readouterr().err.strip().splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_tensors_that_the_base_lacks_are_trained(train: Train, tmp_path: Path) -> None:
    """A text-to-video model has no phi, and fewer channels than a paradigm that appends the image."""
    write_base(tmp_path / "base", dataclasses.replace(CONFIG, conditioning="text_to_video"))
    start = ("--load-weights", f"megatron:{tmp_path / 'base'}", "--lora-rank", 2, "--train-iters", 2)
    assert train("--save", tmp_path / "flashi2v", *start) == 0
    own = {name for name in parameter_shapes(CONFIG) if name.startswith("conditioning.")}
    assert len(own) == 8 and saved(tmp_path / "flashi2v", "model.").keys() == own | pair_names(*ATTENTION)
    assert train("--save", tmp_path / "concat", "--conditioning", "repeat_concat", *start) == 0
    assert saved(tmp_path / "concat", "model.").keys() == {"patch_embedding.weight"} | pair_names(*ATTENTION)


def test_state_is_small(train: Train, tmp_path: Path) -> None:
    """Below 2% of what full training keeps beside the weights: moments, averages, fp32 copies."""
    sizes = ("--hidden-size", 128, "--ffn-hidden-size", 512, "--train-iters", 1, "--bf16", "--ema-decay", 0.5)
    config = dataclasses.replace(CONFIG, hidden_size=128, ffn_hidden_size=512)
    base = write_base(tmp_path / "base", config)
    full, part = Keep(), Keep()
    assert train(*sizes, observers=[full]) == 0
    beside = ("--load-weights", f"megatron:{base}", "--lora-rank", 1)
    assert train(*sizes, *beside, observers=[part]) == 0
    assert full.state_bytes > 12 * parameter_count(config) and 0 < part.state_bytes < 0.02 * full.state_bytes
    # Of the models that people have, at a usual rank: counted in values, each of which has as many bytes of state.
    large = ModelConfig(num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40)
    adapter = AdapterConfig(rank=32, alpha=32.0, targets=ATTENTION)
    assert sum(map(math.prod, adapter_shapes(large, adapter).values())) < 0.01 * parameter_count(large)


def velocity(folder: Path, scale: float = 1.0, base: tuple[str, Path] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noisy, image = (torch.randn(1, *shape, generator=generator) for shape in (LATENT_SHAPE, (LATENT_SHAPE[0], 1, 4, 4)))
    text = torch.randn(1, TEXT_LENGTH, TEXT_DIM, generator=generator)
    device = resolve_device("cpu")
    with single_process(device) as groups, torch.no_grad():
        (model,) = load_stages(folder, groups, device, ParallelArguments(), adapter_scale=scale, base=base)
        return predict_velocity(model, noisy, torch.tensor([600.0]), text, image, {"cutoff_ratio": torch.tensor([0.1])})


def test_sampling_finds_the_base(train: Train, base: Path, tmp_path: Path) -> None:
    """W + scale * B A in the base's place, by hand, predicts the same."""
    moving = tmp_path / "base"
    shutil.copytree(base, moving)
    run = ("--lora-rank", 2, "--lora-alpha", 6, "--lora-targets", "all", "--train-only", "phi")
    assert train("--save", tmp_path / "run", "--load-weights", f"megatron:{moving}", *run) == 0
    folder = find_checkpoint(tmp_path / "run")
    merged = saved(base, "model.") | {
        name: value for name, value in saved(tmp_path / "run", "model.").items() if "adapter" not in name
    }
    pairs = {layer: [half.read() for half in pair.tensors] for layer, pair in open_adapter(folder).pairs.items()}
    for row in mappings(CONFIG, "wan"):
        parts = list(row.to_external(merged[row.ours]))
        for place, name in enumerate(row.external):
            a, b = pairs.get(name.removesuffix(".weight"), (None, None))
            if a is not None and name.endswith(".weight"):
                parts[place] = parts[place] + 1.5 * 3 * b @ a
        merged[row.ours] = row.to_ours(parts)
    pieces = [TensorPiece.whole(f"model.{name}", value) for name, value in merged.items()]
    state = {"iteration": 0, "consumed_samples": 0}
    whole = save_checkpoint(tmp_path / "merged", 0, pieces=pieces, model_config=CONFIG, state=state)
    found, expected = velocity(folder, scale=1.5), velocity(whole)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - velocity(folder)).abs().max() > 1e-3 < (found - velocity(base)).abs().max()

    shutil.rmtree(moving)
    with pytest.raises(CheckpointError, match="does not exist; give these weights as --base FORMAT:PATH"):
        velocity(folder)
    assert torch.equal(velocity(folder, scale=1.5, base=("megatron", base)), found)
    write_base(moving, CONFIG, seed=6)
    shutil.copytree(moving / "iter_0000000", tmp_path / "again")
    shutil.rmtree(moving)
    shutil.move(tmp_path / "again", moving)
    with pytest.raises(CheckpointError, match="trained beside other weights than megatron:"):
        velocity(folder)


def record_of(run: Path) -> AdapterRecord:
    record = read_adapter_record(find_checkpoint(run))
    assert record is not None
    return record


def test_the_record_names_the_weights_that_were_read(train: Train, base: Path, tmp_path: Path) -> None:
    """In a format, and a folder that does not move; links stay, as the Hub's cache has them."""
    run = ("--lora-rank", 2, "--train-iters", 1)
    assert train("--save", tmp_path / "auto", "--load-weights", f"auto:{base.parent}", *run) == 0
    assert record_of(tmp_path / "auto").base == f"megatron:{base}"
    converted = tmp_path / "converted"
    convert(("megatron", base), ("flashi2v-gpu", converted))
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for number, path in enumerate(sorted(converted.iterdir())):
        blob = tmp_path / f"blob{number}"
        shutil.copy(path, blob)
        (cache / path.name).symlink_to(blob)
    (weights,) = cache.glob("*.safetensors")
    assert train("--save", tmp_path / "linked", "--load-weights", f"flashi2v-gpu:{weights}", *run) == 0
    assert record_of(tmp_path / "linked").base == f"flashi2v-gpu:{weights}"
    assert torch.equal(velocity(find_checkpoint(tmp_path / "linked")), velocity(find_checkpoint(tmp_path / "auto")))


def test_the_record_names_a_trainer_s_iteration(train: Train, base: Path, tmp_path: Path) -> None:
    values = {row.external[place]: part for row in mappings(CONFIG, "wan")
              for place, part in enumerate(row.to_external(saved(base, "model.")[row.ours]))}  # fmt: skip
    folder = tmp_path / "trainer" / "iter_000000007"
    folder.mkdir(parents=True)
    torch.save(values, folder / "model_state_dict.pt")
    start = ("--load-weights", f"auto:{tmp_path / 'trainer'}", "--lora-rank", 2, "--train-iters", 1)
    assert train("--save", tmp_path / "run", *start) == 0
    record = record_of(tmp_path / "run")
    assert record.base == f"flashi2v-gpu:{folder}"
    assert record.base_fingerprint == base_fingerprint(open_weights(base, ReadOptions()))


def test_an_averaged_base(
    train: Train, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages say that the average is meant; it is found in its own folder, in a copy and in a conversion of it."""
    whole = tmp_path / "whole"
    assert train("--save", whole, "--load-weights", f"megatron:{base}", "--ema-decay", 0.5) == 0
    average = ("--load-weights", f"megatron:{whole}", "--load-weights-kind", "ema")
    assert train("--save", tmp_path / "run", *average, "--lora-rank", 2, "--train-iters", 1) == 0
    folder = find_checkpoint(tmp_path / "run")
    flags = f"--load-weights megatron:{find_checkpoint(whole)} --load-weights-kind ema"
    capsys.readouterr()
    for given in ((), ("--load-weights", f"megatron:{whole}", "--lora-rank", 2)):
        assert train("--save", tmp_path / "run", *given) == 1
        assert capsys.readouterr().err.strip().endswith(flags)
    expected = velocity(folder)
    shutil.move(whole, tmp_path / "moved")
    convert(("megatron", tmp_path / "moved"), ("diffusers", tmp_path / "converted"), weights="ema")
    for source in (("megatron", tmp_path / "moved"), ("diffusers", tmp_path / "converted")):
        assert torch.equal(velocity(folder, base=source), expected)
    with pytest.raises(CheckpointError, match="other weights than megatron:.*give those of megatron:.* as --base"):
        velocity(folder, base=("megatron", base))


def test_scales_of_any_sign(train: Train, base: Path, beside: tuple[str, str], tmp_path: Path) -> None:
    assert train("--save", tmp_path, *beside, *LORA) == 0
    folder = find_checkpoint(tmp_path)
    assert torch.equal(velocity(folder, scale=0), velocity(base))
    assert not torch.allclose(velocity(folder, scale=-1), velocity(folder), rtol=1e-3)


def test_what_is_trained_is_told(
    train: Train, beside: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--save", tmp_path, *beside, *LORA, "--train-only", "phi|norm3", "--exit-interval", 2) == 0
    record = record_of(tmp_path)
    values = sum(map(math.prod, record.shapes(CONFIG).values()))
    told = capsys.readouterr().err
    assert re.search(
        rf"training {values:,} of [\d,]+ values: rank 2, alpha 6, targets self_attn.q, .*; whole: \d+ tensors \(", told
    ), told
    rows = metrics(tmp_path)
    assert all(row["tflops"] is None and row["mfu"] is None for row in rows)  # a whole model's would not be comparable
    assert train("--save", tmp_path) == 1
    assert "--train-only 'phi|norm3' --load-weights" in capsys.readouterr().err
    assert train("--save", tmp_path, *beside, *LORA, "--train-only", "phi|norm3") == 0
    told = capsys.readouterr().err
    assert train(*beside, *LORA, "--dry-run") == 0
    assert "# trained: without tensors that --load-weights may lack" in capsys.readouterr().out
    assert "frozen weights are those of megatron:" in told and "starting from the weights" not in told


def test_a_name_that_the_model_has_not(train: Train, beside: tuple[str, str], tmp_path: Path) -> None:
    assert train("--save", tmp_path, *beside, *LORA, "--train-only", "phi", "--train-iters", 1) == 0
    record = dataclasses.replace(record_of(tmp_path), trained=("blocks.0.norm4.weight",))
    with pytest.raises(CheckpointError, match="names blocks.0.norm4.weight as trained"):
        record.shapes(CONFIG)


def test_the_fingerprint_sees_every_projection() -> None:
    """Of a 14B model: in all fused tensors, rows of each projection are among those that are read."""
    large = ModelConfig(num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40)
    shapes, read = parameter_shapes(large), 0
    for name, shape in shapes.items():
        rows = [row for stretch in sampled_rows(name, shape) for row in range(stretch.start, stretch.stop)]
        assert rows == sorted(set(rows)) and rows[-1] < shape[0]
        read += len(rows) * math.prod(shape[1:])
        parts = fused_parts(name)
        if parts and name.endswith(".weight"):
            assert {row // large.head_dim % len(parts) for row in rows} == set(range(len(parts))), name
    assert 4 * read < 0.25e9


def test_ranks_share_the_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each verifies its part of the files, the first one hashes, and all compare a few values."""
    verified: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "megatron_flashi2v.checkpoint.folders.verify",
        lambda folder, *, part, parts, needs: verified.append((part, parts)),
    )
    source = ("megatron", base)
    mine = open_initial_weights(source, CONFIG, peers=SecondRank([str(base)])).weights
    assert verified == [(1, 2)]
    other = open_weights(write_base(tmp_path / "other", CONFIG, seed=6), ReadOptions())
    shared = [[base_fingerprint(weights, values=1, rows=1), base_fingerprint(weights)] for weights in (mine, other)]
    assert common_fingerprint(mine, SecondRank(shared[0])) == base_fingerprint(mine)
    with pytest.raises(CheckpointError, match="other weights here than on rank 0; copy the same to all nodes"):
        common_fingerprint(mine, SecondRank(shared[1]))


def test_linears_of_another_library_are_refused() -> None:
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.linear_fc1 = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="megatron-core's own linears, and mlp.linear_fc1 is a Linear"):
        add_adapters(block, None, AdapterConfig(rank=1, alpha=1.0, targets=("ffn.0",)))
