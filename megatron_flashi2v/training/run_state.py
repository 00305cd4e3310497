"""What a checkpoint's ``state.json`` says of the run, besides the optimizer's and the clipper's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.folders import STATE_NAME, load_state
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.provenance import source_commit
from megatron_flashi2v.version import __version__


def provenance(config: TrainConfig, data: Blend, launch: LaunchEnvironment) -> dict[str, Any]:
    """With what code, seed, data and layout a run is trained."""
    info = data.info
    return {
        "version": __version__,
        "seed": config.batch.seed,
        "data": {"samples": len(data), "fingerprint": data.fingerprint, "frames": info.frames, "height": info.height,
                 "width": info.width, "fps": info.fps},
        "layout": layout_of(config, launch.world_size),
        "commit": source_commit() if launch.rank == 0 else None,
    }


def layout_of(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """How the model and the batch were divided, and in what precision, for the record."""
    parallel = config.parallel
    return {
        "processes": world_size,
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "global_batch_size": config.batch.global_batch_size,
        "precision": "bf16" if config.batch.bf16 else "fp32",
    }


def load_training_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``; one of converted weights, at iteration 0, knows no run.

    Raises:
        CheckpointError: it is missing, malformed or lacks an entry.
    """
    state = load_state(folder)
    names = ["iteration", "consumed_samples", *(("seed", "data", "optimizer") if state.get("iteration") else ())]
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(
            f"{folder / STATE_NAME} has no {', '.join(missing)}; the checkpoint is damaged, load another one"
        )
    return state
