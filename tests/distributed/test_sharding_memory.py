"""Sharded weights: what a rank keeps is counted, and no rank holds the model, not even while it starts."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.synthetic_data import write_synthetic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.parallel.world import world
from megatron_flashi2v.planning.state_memory import state_memory
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.training.assembly import open_trainer
from megatron_flashi2v.training.holdings import holding_of
from megatron_flashi2v.training.watching.observer import Observer

WORLD = 2
LATENTS = (16, 2, 8, 10)
STRATEGIES = ("optim_grads", "optim_grads_params")


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live.

    Attributes:
        peak: most at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages = WeakIdKeyDictionary(ref_type=weakref.ref)

    @property
    def live(self) -> int:
        return sum(storage.nbytes() for storage in self._storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
                self._storages[tensor.untyped_storage()] = True
        self.peak = max(self.peak, self.live)
        return made


class HeldInSecond(Observer):
    """Bytes of all tensors when the second iteration's gradients are reduced: nothing is gathered then."""

    bytes = 0

    def gradients_ready(self, state: Any, totals: Any) -> None:
        if state.iteration == 1:
            self.bytes = held_bytes()


def held_bytes() -> int:
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(rank: int, folder: Path, flags: list[str]) -> None:
    config = parse(TrainConfig, flags, prog="measure", description="")
    launch, model = detect_launch(os.environ), resolve_model(config.model)
    device, second = resolve_device("cpu", launch.local_rank), HeldInSecond()
    before, memory = held_bytes(), LiveMemory()
    with world(device, launch, config.parallel) as groups:
        opening = open_trainer(config, model, groups, launch, device, observers=[second])
        with memory:
            trainer = opening.__enter__()
        live = memory.live
        try:
            held = holding_of(trainer.state.stages, trainer.state.parameter_shapes(), [LATENTS[1:]])
            planned = state_memory(held, config, WORLD)
            trainer.train()
        finally:
            opening.__exit__(None, None, None)
    found = {"parameters": held.parameters, "weights": 4 * held.parameters - 2 * held.bf16_parameters,
             "beside": memory.peak - live, "planned": planned.kept, "held": second.bytes - before}
    del opening, trainer, groups
    found["left"] = held_bytes() - before
    (folder / f"measured-{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    folder = tmp_path_factory.mktemp("memory")
    data = write_synthetic(folder / "set", 6, LATENTS, 64, 32, seed=3)
    found = {}
    for strategy in STRATEGIES:
        flags = ["--model", "tiny", "--num-layers", "12", "--data-path", str(data), "--device", "cpu", "--bf16",
                 "--train-iters", "2", "--global-batch-size", "2", "--data-parallel-sharding-strategy", strategy]
        run_ranks(measure, WORLD, folder, folder, flags)
        found[strategy] = [json.loads((folder / f"measured-{rank}.json").read_text()) for rank in range(WORLD)]
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_keeps_what_is_planned(measured: dict[str, list[dict[str, int]]], strategy: str) -> None:
    for rank in measured[strategy]:
        assert rank["held"] == pytest.approx(rank["planned"], rel=0.03)
        if strategy == "optim_grads_params":  # weight 2, its fp32 copy 4, gradient 4, moments 8
            assert rank["held"] == pytest.approx(18 * rank["parameters"] / WORLD, rel=0.03)


def test_no_rank_makes_the_model_while_it_starts(measured: dict[str, list[dict[str, int]]]) -> None:
    for rank in measured["optim_grads_params"]:
        assert rank["beside"] < rank["weights"] / 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_is_over_holds_nothing(measured: dict[str, list[dict[str, int]]], strategy: str) -> None:
    for rank in measured[strategy]:
        assert rank["left"] < 0.01 * rank["held"]
