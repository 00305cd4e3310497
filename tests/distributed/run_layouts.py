"""Runs training layouts one after another in one set of processes, so that a world pays its start-up once.

Started by the parity tests as ``python -m torch.distributed.run --nproc-per-node N run_layouts.py PLAN.json``. The plan
is a list of ``{"name", "flags"}``; each run saves under its name, and the gradients of its last iteration lie beside
its checkpoints in ``gradients/``, in the same sharded format. Without pipeline stages, what the trained model predicts
lies in ``velocity.safetensors``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

import torch
from planted_bugs import planted
from planted_faults import faulty
from safetensors.torch import save_file

from megatron_flashi2v.checkpoint.index import write_index
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.state import model_pieces
from megatron_flashi2v.checkpoint.storage import merge_parts, write_rank_file
from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_train
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.parallel.groups import destroy_groups
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.distributed import init_distributed, shutdown
from megatron_flashi2v.runtime.launch import detect_launch
from megatron_flashi2v.runtime.redirect import megatron_on
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.trainer import Trainer


def write_gradients(trainer, folder: Path) -> None:
    """The reduced gradient of every parameter, as one tensor per global name."""
    pieces = [
        dataclasses.replace(piece, data=parameter.main_grad.detach().clone())
        for piece, (_, parameter) in zip(
            model_pieces(trainer.named_parameters(), trainer.grid), trainer.named_parameters(), strict=True
        )
    ]
    peers = Peers(trainer.launch.rank, trainer.launch.world_size)
    parts = peers.gather(write_rank_file(folder, pieces, rank=peers.rank, world_size=peers.world_size))
    if peers.rank == 0:
        write_index(folder, merge_parts(parts))


def write_velocity(trainer, folder: Path) -> None:
    """The prediction for the data's first samples, as sampling asks for it; rank 0 writes."""
    source = MicrobatchSource(trainer.data, trainer.model_config, trainer.config.data, trainer.config.batch,
                              dp_rank=0, dp_size=1, device=trainer.spec.device)
    batch = source.load(range(2)).batch
    with torch.no_grad():
        chunks = [chunk.eval() for chunk in trainer.chunks]
        velocity = predict_velocity(chunks, batch.noise_BCTHW, 1000 * batch.sigma_B, batch.text_BLX,
                                    batch.latents_BCTHW[:, :, :1], batch.extras)
    if trainer.launch.rank == 0:
        save_file({"velocity": velocity.contiguous()}, folder / "velocity.safetensors")


def make_trainer(flags: list[str], launch, device) -> Trainer:
    config = parse(TrainConfig, flags, prog="run_layouts", description="")
    model = resolve_model(config.model)
    check_train(config, model, launch.world_size)
    return Trainer(config, model, launch, device)


def save_again(flags: list[str], launch, device) -> None:
    """Load a checkpoint, and write what was loaded."""
    make_trainer(flags, launch, device).save()
    destroy_groups()


def train(flags: list[str], launch, device) -> None:
    """One training run, with the gradients of its last iteration kept."""
    trainer = make_trainer(flags, launch, device)
    config, step = trainer.config, trainer.step
    accumulate = step.losses_and_gradients

    def keep_gradients(*arguments):
        loss = accumulate(*arguments)
        if trainer.iteration == config.batch.train_iters - 1:
            folder = config.checkpoint.save / "gradients"
            folder.mkdir(parents=True, exist_ok=True)
            torch.distributed.barrier()
            write_gradients(trainer, folder)
        return loss

    step.losses_and_gradients = keep_gradients
    noted = noted_samples(config.checkpoint.save / f"samples-{launch.rank}.jsonl")
    with counted_encodings() as calls, noted, noted_warnings(config.checkpoint.save / f"warnings-{launch.rank}.txt"):
        trainer.train()
    write_velocity(trainer, config.checkpoint.save)
    if config.data.online_encoding:
        (config.checkpoint.save / f"encodings-{launch.rank}.txt").write_text(str(len(calls)))
    destroy_groups()


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


def main() -> None:
    """Run the whole plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    launch = detect_launch(os.environ)
    device = resolve_device("cpu", launch.local_rank)
    init_distributed(launch, device, 5)
    with megatron_on(device):
        for entry in plan:
            with planted(entry["bug"]), faulty(entry["fault"]):
                (save_again if entry["saves_again"] else train)(entry["flags"], launch, device)
    shutdown()


if __name__ == "__main__":
    main()
