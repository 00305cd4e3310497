"""Runs training layouts one after another in one set of processes, so that a world pays its start-up once.

Each run saves under its name, and the gradients of its last iteration lie beside its checkpoints in ``gradients/``, in
the same sharded format, and what ranks should hold alike but do not in ``disagreements.json``. What the trained model
predicts lies in ``velocity.safetensors``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from helpers.planted_bugs import planted_bug
from helpers.planted_faults import planted_fault
from megatron_flashi2v.checkpoint.index import index_text, parse_index, write_index
from megatron_flashi2v.checkpoint.model_state import model_pieces
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.storage import merge_parts, write_rank_file
from megatron_flashi2v.config.layout import FULLY_SHARDED, asked_sharding
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_train
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.parallel.world import world
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.training.assembly import open_trainer
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.state import TrainState
from megatron_flashi2v.training.trainer import Trainer
from megatron_flashi2v.training.watching.observer import Observer

if TYPE_CHECKING:
    from helpers.layouts import Layout


class KeepGradients(Observer):
    """Writes the reduced gradients of the last iteration, and notes those that ranks hold copies of that differ."""

    def __init__(self, config: TrainConfig) -> None:
        self.folder, self.last = config.checkpoint.save / "gradients", config.batch.train_iters
        # Which leaves each replica its own part of them.
        self.compares = asked_sharding(config.parallel) == "no_shard"
        self.keeps = asked_sharding(config.parallel) not in FULLY_SHARDED
        self.disagreements: list[str] = []

    def gradients_ready(self, state, totals) -> None:
        if self.keeps and state.iteration == self.last - 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.distributed.barrier()
            write_gradients(state, self.folder)
            if self.compares:
                self.disagreements = [f"grad {name}" for name in differing(digests(state, lambda p: p.main_grad))]


def write_gradients(state: TrainState, folder: Path) -> None:
    """The reduced gradient of every parameter, as one tensor per global name."""
    pieces = [
        dataclasses.replace(piece, data=parameter.main_grad.detach().clone())
        for piece, (_, parameter) in zip(
            model_pieces(state.named_parameters(), state.grid), state.named_parameters(), strict=True
        )
    ]
    peers = Peers(torch.distributed.get_rank(), torch.distributed.get_world_size())
    part = write_rank_file(folder, pieces, rank=peers.rank, world_size=peers.world_size)
    parts = peers.collect(index_text(part).encode())
    if peers.rank == 0:
        write_index(folder, merge_parts([parse_index(text.decode(), folder) for text in parts]))


def digests(state: TrainState, tensor_of) -> dict[str, str]:
    """Hashes of this rank's tensors, by a name that ranks have in common where they hold the same tensor."""
    if state.fully_sharded:
        return {}  # no two ranks hold the same
    found = {}
    for name, parameter in state.named_parameters():
        shard = state.spec.groups.tp.rank() if getattr(parameter, "tensor_model_parallel", False) else "all"
        data = tensor_of(parameter).detach().contiguous().view(torch.uint8).numpy()
        found[f"{name} (tensor rank {shard})"] = hashlib.sha256(data).hexdigest()
    return found


def differing(own: dict[str, str]) -> list[str]:
    """Names that several ranks gave, with different hashes."""
    everyone: list[dict[str, str]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    by_name = defaultdict(set)
    for one in everyone:
        for name, digest in one.items():
            by_name[name].add(digest)
    return sorted(name for name, found in by_name.items() if len(found) > 1)


def write_velocity(trainer: Trainer, config: TrainConfig) -> None:
    """The prediction for the data's first samples, as sampling asks for it; rank 0 writes."""
    spec = trainer.state.spec
    source = MicrobatchSource(trainer.source.data, spec.config, config.data, config.batch, dp_rank=0, dp_size=1,
                              device=spec.device)
    batch = source.load(range(2)).batch
    trainer.state.gather_weights()
    with torch.no_grad():
        stages = [stage.eval() for stage in trainer.state.stages]
        velocity = predict_velocity(stages, batch.noise_BCTHW, 1000 * batch.sigma_B, batch.text_BLX,
                                    batch.latents_BCTHW[:, :, :1], batch.extras)
    if torch.distributed.get_rank() == 0:
        save_file({"velocity": velocity.contiguous()}, config.checkpoint.save / "velocity.safetensors")


def run_layout(layout: Layout, launch, device, planted: list[Observer]) -> None:
    """One training run, with the gradients of its last iteration kept; or only a checkpoint loaded and written."""
    config = parse(TrainConfig, list(layout.flags), prog="run_plan", description="")
    model = resolve_model(config.model)
    check_train(config, model, launch.world_size)
    kept = KeepGradients(config)
    with (
        world(device, launch, config.parallel, timeout_minutes=5) as groups,
        open_trainer(config, model, groups, launch, device, observers=[*planted, kept]) as trainer,
    ):
        if layout.saves_again:
            trainer.checkpoints.save(last=True)
            return
        save, rank = config.checkpoint.save, launch.rank
        noted = noted_samples(save / f"samples-{rank}.jsonl")
        with counted_encodings() as calls, noted, noted_warnings(save / f"warnings-{rank}.txt"):
            trainer.train()
        write_velocity(trainer, config)
        disagreements = [*kept.disagreements, *differing(digests(trainer.state, lambda p: p))]
        if rank == 0:
            (save / "disagreements.json").write_text(json.dumps(disagreements))
        if config.data.online_encoding:
            (save / f"encodings-{rank}.txt").write_text(str(len(calls)))


@contextlib.contextmanager
def counted_encodings():
    """A list that grows by one with each clip that this process encodes."""
    calls, encode = [], VideoVAE.encode

    def counted(vae, video):
        calls.append(1)
        return encode(vae, video)

    VideoVAE.encode = counted
    try:
        yield calls
    finally:
        VideoVAE.encode = encode


@contextlib.contextmanager
def noted_samples(path: Path):
    """Each sample that this process reads, with its position, is a line of the file."""
    read = Blend.read

    def noted(blend, positions):
        samples, bad = read(blend, positions)
        with open(path, "a") as file:
            file.writelines(json.dumps([p, sample.key]) + "\n" for p, sample in zip(positions, samples, strict=True))
        return samples, bad

    Blend.read = noted
    try:
        yield
    finally:
        Blend.read = read


@contextlib.contextmanager
def noted_warnings(path: Path):
    """What this process warns of goes to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler, package = logging.FileHandler(path, mode="w"), logging.getLogger("megatron_flashi2v")
    handler.setLevel(logging.WARNING)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def run_plan(rank: int, plan: list[Layout]) -> None:
    """Run the whole plan, as one of its ranks."""
    launch = detect_launch(os.environ)
    device = resolve_device("cpu", launch.local_rank)
    for layout in plan:
        with planted_bug(layout.bug) as bug, planted_fault(layout.fault) as fault:
            run_layout(layout, launch, device, [*bug, *fault])
