"""What ranks hold: a run says it when it starts, and --dry-run says the same without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.ranks import log_of, run_ranks
from helpers.synthetic_data import write_synthetic
from helpers.tiny_models import make_tiny_vae
from helpers.train_command import FLAGS, TEXT_DIM, TEXT_LENGTH

from megatron_flashi2v.cli.main import main

MODEL = [part for name, value in {**FLAGS, "num-layers": 5}.items() for part in (f"--{name}", str(value))]
LAYOUTS = {
    "pp2-virtual2-cp2": ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2",
                         "--context-parallel-size", "2"],
    "tp2-sp-fsdp2": ["--tensor-model-parallel-size", "2", "--sequence-parallel",
                     "--data-parallel-sharding-strategy", "optim_grads_params"],
}
LINE = re.compile(
    r"pipeline rank (\d+): each of (\d+) ranks holds (\d+) blocks, ([\d,]+) parameters"
    r"(?:, of which it keeps one of 2 parts,)? and ([\d,]+) visual tokens"
)
WORK = re.compile(r"(\d+) microbatches of 1 samples each iteration on each of (\d+) replicas")


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two buckets: the second has the larger samples, of 15 tokens, a number that two ranks must pad."""
    folder, words = tmp_path_factory.mktemp("data"), ["--data-path"]
    for index, shape in enumerate([(4, 2, 4, 4), (4, 1, 6, 10)]):
        words += ["0.5", str(write_synthetic(folder / str(index), 6, shape, TEXT_DIM, TEXT_LENGTH, seed=index))]
    return words


@pytest.fixture
def dry_run(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    def dry_run(*flags: object) -> dict:
        assert run_command(*MODEL, *flags, "--dry-run") == 0
        return yaml.safe_load(capsys.readouterr().out)

    return dry_run


def train(rank: int, flags: list[str]) -> None:
    assert main(["train", *flags]) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_tells_what_the_ranks_of_a_run_hold(
    layout: str, blend: list[str], dry_run: Callable[..., dict], tmp_path: Path
) -> None:
    flags = [*blend, *LAYOUTS[layout], "--micro-batch-size", "1"]
    run_ranks(train, 4, tmp_path, [*MODEL, *flags, "--train-iters", "1"])
    told = log_of(tmp_path, 4, 0).read_text()
    held = [tuple(int(number.replace(",", "")) for number in found) for found in LINE.findall(told)]
    report = dry_run(*flags, "--world-size", "4")
    places = [name for name in report if re.fullmatch(r"pipeline_\d+", name)]
    assert [row[0] for row in held] == list(range(len(places))) and {row[1] for row in held} == {4 // len(places)}
    assert sum(row[2] for row in held) == 5  # every block on one place
    assert {row[4] for row in held} == {8}
    for place, row in zip(places, held, strict=True):
        numbers = [int(str(report[place][name]).replace(",", "")) for name in ("parameters", "visual_tokens")]
        assert numbers == list(row[3:])
    sharded = "optim_grads_params" in flags
    assert ("keeps one of 2 parts" in told) == ("in_flight_gb" in report["pipeline_0"]) == sharded
    ((microbatches, replicas),) = WORK.findall(told)
    assert str(report["data"]).split()[0] == replicas and report["microbatches"] == f"{microbatches} of 1"


def test_a_dry_run_of_online_encoding_goes_by_the_clips_that_it_encodes(
    dry_run: Callable[..., dict], tmp_path: Path
) -> None:
    flags = ["--online-encoding", "--annotations", "a.json", "--text-encoder", "t", "--tokenizer", "t",
             "--num-frames", "9", "--height", "32", "--width", "64"]
    planned = dry_run(*flags, "--vae", tmp_path / "absent")
    assert planned["pipeline_0"]["visual_tokens"] == 3 * 2 * 4  # Wan's strides, 4 and 8, and patches of 2 x 2
    vae = make_tiny_vae(tmp_path / "vae", temporal=(False, True))
    assert dry_run(*flags, "--vae", vae)["pipeline_0"]["visual_tokens"] == 5 * 4 * 8  # strides of 2 and 4


def test_a_plan_goes_by_the_data_that_are_there_and_refuses_what_a_run_would(
    blend: list[str], dry_run: Callable[..., dict], run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert dry_run(*blend[:-1], tmp_path / "absent")["pipeline_0"]["visual_tokens"] == 8  # of the first folder
    assert run_command(*MODEL, *blend[:-1], "--dry-run") == 2
    assert "--data-path" in capsys.readouterr().err
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    online = ["--online-encoding", "--annotations", "a.json", "--text-encoder", "t", "--tokenizer", "t"]
    assert run_command(*MODEL, *online, "--vae", tmp_path / "vae", "--dry-run") == 2
    assert "config.json" in capsys.readouterr().err


def test_a_plan_without_a_launcher(dry_run: Callable[..., dict]) -> None:
    flags = ["--tensor-model-parallel-size", "2", "--global-batch-size", "32"]
    assert (dry_run(*flags)["processes"], dry_run(*flags)["microbatches"]) == (2, "16 of 2")
    planned = dry_run(*flags, "--world-size", "16")
    assert (planned["processes"], planned["data"], planned["microbatches"]) == (16, 8, "2 of 2")


def test_a_plan_is_no_run(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(*MODEL, "--world-size", "16") == 2
    assert "--world-size is 16, but 1 processes were started" in capsys.readouterr().err
