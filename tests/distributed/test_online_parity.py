"""Online encoding: the run is that of prepared data, in every layout, and a replica encodes each clip once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.layouts import Layout, assert_same_metrics, run_layouts
from helpers.tiny_corpus import make_corpus

from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.data.run import prepare

CLIPS, SEED = 6, "7"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
REPLICAS = {"single": 1, "dp2": 2, "tp2": 1, "pp2": 1, "pp2-virtual2": 1, "cp2": 1, "pp4": 1, "tp2-dp2": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three epochs of six clips, in iterations of four with two microbatches or more."""
    folder = tmp_path_factory.mktemp("online")
    shared = make_corpus(folder / "corpus", CLIPS)
    prepared = [*shared, "--seed", SEED, "--output", str(folder / "data"), "--samples-per-shard", "4"]
    prepare(parse(PrepareConfig, prepared, prog="prepare", description=""))
    online = ("--online-encoding", *shared)
    prepared_data = ("--data-path", str(folder / "data"), "--text-length", "32")
    adam = ("--optimizer", "adam", "--lr", "1e-4", "--adam-eps", "1e-5")
    layouts = [
        Layout("prepared", 1, prepared_data),
        Layout("prepared-adam", 1, (*prepared_data, *adam)),
        Layout("sharded", 2, (*online, *adam, "--data-parallel-sharding-strategy", "optim_grads_params")),
        Layout("single", 1, online),
        Layout("dp2", 2, online),
        Layout("tp2", 2, (*online, TP, "2", "--sequence-parallel")),
        Layout("pp2", 2, (*online, PP, "2")),
        Layout("pp2-virtual2", 2, (*online, PP, "2", "--num-virtual-stages-per-pipeline-rank", "2")),
        Layout("cp2", 2, (*online, "--context-parallel-size", "2", "--context-parallel-algo", "ring")),
        Layout("pp2-half", 2, (*online, PP, "2", "--exit-interval", "2")),
        Layout("pp4", 4, (*online, PP, "4")),
        Layout("tp2-dp2", 4, (*online, TP, "2", "--encoding-cache", str(folder / "cache"))),
        Layout("again", 4, (*online, TP, "2", "--encoding-cache", str(folder / "cache"), "--encoding-cache-mib", "0")),
    ]
    common = ["--model", "tiny", "--device", "cpu", "--train-iters", "5", "--seed", SEED, "--micro-batch-size", "1",
              "--global-batch-size", "4", "--optimizer", "sgd", "--lr", "0.05"]
    return run_layouts(layouts, folder, common)


def encodings(save: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(save.glob("encodings-*.txt"))]


@pytest.mark.parametrize("name", REPLICAS)
def test_every_layout_trains_as_on_prepared_data(runs: dict[str, Path], name: str) -> None:
    assert_same_metrics(runs[name], runs["prepared"])


def test_sharded_weights_train_as_on_prepared_data(runs: dict[str, Path]) -> None:
    assert_same_metrics(runs["sharded"], runs["prepared-adam"])


def test_one_process_is_bit_equal_to_prepared_data(runs: dict[str, Path]) -> None:
    assert_same_metrics(runs["single"], runs["prepared"], relative=0.0)


@pytest.mark.parametrize("name", [name for name, replicas in REPLICAS.items() if replicas == 1])
def test_a_replica_encodes_each_clip_once_and_shares_the_work(runs: dict[str, Path], name: str) -> None:
    counts = encodings(runs[name])
    assert sum(counts) == CLIPS
    assert min(counts) >= 1  # middle stages too


def test_replicas_encode_for_themselves_and_no_more(runs: dict[str, Path]) -> None:
    for name in ("dp2", "tp2-dp2"):
        assert CLIPS <= sum(encodings(runs[name])) <= 2 * CLIPS


def test_a_cache_on_disk_saves_the_next_run_from_encoding(runs: dict[str, Path]) -> None:
    assert sum(encodings(runs["again"])) == 0
    assert_same_metrics(runs["again"], runs["prepared"])


def test_a_run_that_leaves_early_ends_in_order(runs: dict[str, Path]) -> None:
    assert (runs["pp2-half"] / "metrics.jsonl").read_text().count("\n") == 2
