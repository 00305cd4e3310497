"""Runs whose adapters start from one that is there: another program's file, or an earlier run's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.base_weights import write_base
from helpers.layouts import metrics, tensors
from helpers.second_rank import SecondRank
from helpers.train_command import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_flashi2v.checkpoint.adapter_record import AdapterRecord
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.adapter import AdapterConfig
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.conversion.adapters.initial import open_initial_adapter
from megatron_flashi2v.training.state import TrainState
from megatron_flashi2v.training.watching.observer import Observer

Train = Callable[..., int]
# The small model of tests/helpers/train_command.py.
CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, latent_channels=LATENT_SHAPE[0],
    text_dim=TEXT_DIM, text_length=TEXT_LENGTH,
)
LORA = ("--lora-rank", 2, "--lora-alpha", 6, "--lora-targets", "self_attn.q", "self_attn.v", "ffn.2")
PLACES = {"self_attn.q": ("attn1.to_q", 32, 32), "self_attn.v": ("attn1.to_v", 32, 32), "ffn.2": ("ffn.net.2", 48, 32)}
"""By Wan's name: diffusers' own, inputs and outputs."""


class Start(Observer):
    """The weights that a run starts with."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def between_iterations(self, state: TrainState) -> None:
        if not self.weights:
            self.weights = {
                name: parameter.detach().clone() for stage in state.stages
                for name, parameter in stage.named_parameters()
            }  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("start") / "base", CONFIG)


@pytest.fixture
def beside(base: Path) -> tuple[str, str]:
    return "--load-weights", f"megatron:{base.parent}"


def matrices(places: dict[str, tuple[str, int, int]] = PLACES, rank: int = 2) -> dict[tuple[int, str, str], Tensor]:
    """Random pairs of both blocks, by block, Wan's name and factor."""
    torch.manual_seed(0)
    drawn = {}
    for block in range(2):
        for name, (_, inputs, outputs) in places.items():
            drawn[block, name, "A"] = torch.randn(rank, inputs) / 5
            drawn[block, name, "B"] = torch.randn(outputs, rank) / 5
    return drawn


def comfyui(path: Path, alpha: float | None = 6.0, **options) -> Path:
    held = {}
    for (block, name, factor), value in matrices(**options).items():
        stem = f"diffusion_model.blocks.{block}.{name}"
        held[f"{stem}.lora_{'down' if factor == 'A' else 'up'}.weight"] = value
        if alpha is not None:
            held[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(held, path)
    return path


def peft(path: Path) -> Path:
    """Without settings alpha is the rank."""
    save_file({
        f"transformer.blocks.{block}.{PLACES[name][0]}.lora_{factor}.weight": value
        for (block, name, factor), value in matrices().items()
    }, path)  # fmt: skip
    return path


def ours(block: int, name: str, factor: str) -> str:
    place = {"self_attn.q": "self_attention.linear_qkv.adapter.q", "self_attn.v": "self_attention.linear_qkv.adapter.v",
             "ffn.2": "mlp.linear_fc2.adapter"}[name]
    return f"blocks.{block}.{place}.lora_{factor}.weight"


@pytest.mark.parametrize("write, flags", [(comfyui, ()), (peft, ("--lora-alpha", 2))])
def test_pairs_start_as_the_file_has_them(
    train: Train, beside: tuple[str, str], tmp_path: Path, write: Callable[[Path], Path], flags: tuple
) -> None:
    start = Start()
    file = write(tmp_path / "lora.safetensors")
    assert train(*beside, *LORA, *flags, "--load-adapter", file, "--train-iters", 1, observers=[start]) == 0
    drawn = matrices()
    pairs = {name: value for name, value in start.weights.items() if ".adapter." in name}
    assert pairs.keys() == {ours(*key) for key in drawn}
    assert all(torch.equal(pairs[ours(*key)], value) for key, value in drawn.items())


def test_the_first_loss_is_that_of_merged_weights(train: Train, beside: tuple[str, str], tmp_path: Path) -> None:
    file, merged = comfyui(tmp_path / "lora.safetensors"), tmp_path / "merged"
    convert = ("--from", beside[1].partition(":")[0], beside[1].partition(":")[2], "--adapter", file, "--merge")
    assert main(["convert", *map(str, (*convert, "--to", "megatron", merged))]) == 0
    losses = {}
    for name, flags in {
        "merged": ("--load-weights", f"megatron:{merged}"), "base": beside,
        "adapter": (*beside, *LORA, "--load-adapter", file),
    }.items():
        assert train("--save", tmp_path / "runs" / name, *flags, "--train-iters", 1) == 0
        losses[name] = metrics(tmp_path / "runs" / name)[0]["loss"]
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-5) != pytest.approx(losses["base"], rel=1e-3)


def test_an_earlier_run_s_pairs_and_whole_tensors(
    train: Train, beside: tuple[str, str], base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, start = tmp_path / "first", Start()
    whole = ("--train-only", r"head\.head")
    assert train("--save", first, *beside, *LORA, *whole) == 0
    more = ("--lora-targets", "self_attn", "ffn.2")
    again = ("--load-adapter", first, "--save", tmp_path / "second")
    assert train(*beside, *LORA, *more, *whole, *again, "--train-iters", 2, observers=[start]) == 0
    saved = {key.removeprefix("model."): value for key, value in tensors(find_checkpoint(first), "model.").items()}
    assert all(torch.equal(start.weights[name], value) for name, value in saved.items())
    later = [value for name, value in start.weights.items() if ".adapter." in name and name not in saved]
    assert len(later) == 8 and sum(not value.any() for value in later) == 4, "k and o start as drawn"
    assert "4 pairs start as drawn (blocks.0.self_attn.k" in capfd.readouterr().err
    # The run goes on from its own checkpoint, not from there.
    assert train(*beside, *LORA, *more, *whole, *again, "--train-iters", 4) == 0
    straight = (*again[:2], "--save", tmp_path / "straight")
    assert train(*beside, *LORA, *more, *whole, *straight) == 0
    assert [row["loss"] for row in metrics(tmp_path / "second")] == [row["loss"] for row in metrics(straight[-1])]

    assert train(*beside, *LORA, "--load-adapter", first) == 1
    assert "trained head.linear.weight whole, and this run leaves it frozen" in capfd.readouterr().err
    text = write_base(tmp_path / "text", dataclasses.replace(CONFIG, conditioning="text_to_video"))
    beside_text = ("--load-weights", f"megatron:{text.parent}", *LORA)
    assert train(*beside_text, "--save", tmp_path / "phi", "--train-iters", 1) == 0
    assert train(*beside_text, "--conditioning", "text_to_video", "--load-adapter", tmp_path / "phi") == 1
    assert "is of a flashi2v model and trained" in capfd.readouterr().err
    other = write_base(tmp_path / "other", CONFIG, seed=6)
    assert train("--load-weights", f"megatron:{other.parent}", *LORA, *whole, "--load-adapter", first) == 1
    assert f"was trained beside megatron:{base.parent}" in capfd.readouterr().err


def test_what_a_run_cannot_start_from(
    train: Train, beside: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mixed = load_file(comfyui(tmp_path / "mixed.safetensors"))
    mixed["diffusion_model.blocks.0.ffn.2.alpha"] = torch.tensor(1.0)
    save_file(mixed, tmp_path / "mixed.safetensors")
    deeper = load_file(comfyui(tmp_path / "deeper.safetensors"))
    save_file({name.replace("blocks.1", "blocks.2"): value for name, value in deeper.items()},
              tmp_path / "deeper.safetensors")
    nan = load_file(comfyui(tmp_path / "nan.safetensors"))
    nan["diffusion_model.blocks.0.ffn.2.lora_up.weight"][0, 0] = torch.nan
    save_file(nan, tmp_path / "nan.safetensors")
    time = {"diffusion_model.time_embedding.0.lora_down.weight": torch.ones(2, 16),
            "diffusion_model.time_embedding.0.lora_up.weight": torch.ones(32, 2)}
    save_file(time, tmp_path / "time.safetensors")
    pair = {f"transformer{expert}.blocks.0.attn1.to_q.lora_{factor}.weight": value for expert in ("", "_2")
            for factor, value in (("A", torch.ones(2, 32)), ("B", torch.ones(32, 2)))}
    save_file(pair, tmp_path / "pair.safetensors")
    wide = {**PLACES, "ffn.2": ("ffn.net.2", 64, 32)}
    crossed = {**PLACES, "cross_attn.q": ("attn2.to_q", 32, 32)}
    image = {**PLACES, "cross_attn.k_img": ("attn2.add_k_proj", 32, 32)}
    cases = {
        comfyui(tmp_path / "rank.safetensors", rank=4, alpha=3.0): "give --lora-rank 4 --lora-alpha 3.0",
        comfyui(tmp_path / "alpha.safetensors", alpha=None): "give --lora-rank 2 --lora-alpha 2.0",
        comfyui(tmp_path / "more.safetensors", places=crossed):
            "give --lora-targets self_attn.q self_attn.v cross_attn.q ffn.2",
        comfyui(tmp_path / "image.safetensors", places=image): "cross_attn.k_img, which this run's adapters have not; "
            "it is for another model",
        comfyui(tmp_path / "negative.safetensors", alpha=-1.0): "2 and -1; a run has one of each, above 0",
        tmp_path / "time.safetensors": "has pairs of time_embedding.0",
        comfyui(tmp_path / "wide.safetensors", places=wide): "tensor diffusion_model.blocks.0.ffn.2.lora_down.weight "
            "has shape [2, 64], and this run's has [2, 48]",
        tmp_path / "mixed.safetensors": "these ranks and alphas: 2 and 1, 2 and 6;",
        tmp_path / "deeper.safetensors": "has pairs of blocks.2.",
        tmp_path / "nan.safetensors": "holds values that are NaN",
        tmp_path / "pair.safetensors": "is for a pair of experts",
        tmp_path / "absent.safetensors": "absent.safetensors",
    }  # fmt: skip
    for file, message in cases.items():
        assert train(*beside, *LORA, "--load-adapter", file, "--save", tmp_path / "run") == 1
        error = capfd.readouterr().err
        assert message in error and error.count("error:") == 1 and "reading --load-adapter failed" in error, error
        assert not find_checkpoint(tmp_path / "run")
    assert train(*beside, "--train-only", "head", "--load-adapter", file) == 2
    assert "--load-adapter" in capfd.readouterr().err


def test_ranks_start_from_the_same(tmp_path: Path) -> None:
    adapter = AdapterConfig(rank=2, alpha=6.0, targets=("self_attn.q", "self_attn.v", "ffn.2"))
    record = AdapterRecord(adapter=adapter, trained=(), base="", base_weights="model", base_fingerprint="")
    file = comfyui(tmp_path / "lora.safetensors")
    digests = []

    class FirstRank(SecondRank):
        def share(self, value: object) -> object:
            digests.append(value)
            return value

    open_initial_adapter(file, CONFIG, record, FirstRank())
    assert open_initial_adapter(file, CONFIG, record, SecondRank(*digests)).missing == ()
    changed = load_file(file)
    changed["diffusion_model.blocks.1.ffn.2.lora_up.weight"][3, 1] += 1e-3
    save_file(changed, file)
    with pytest.raises(CheckpointError, match="holds another adapter here than on rank 0; give all nodes the same"):
        open_initial_adapter(file, CONFIG, record, SecondRank(*digests))
    file.unlink()
    with pytest.raises(CheckpointError, match="reading --load-adapter failed: .*lora.safetensors"):
        open_initial_adapter(file, CONFIG, record, SecondRank(*digests))
