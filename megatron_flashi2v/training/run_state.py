"""The checkpoint that a run goes on from, and what its ``state.json`` says besides the trained state."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.folders import STATE_NAME, find_checkpoint, load_state
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.config.train import BatchArguments, ParallelArguments
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.runtime.provenance import source_commit
from megatron_flashi2v.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """With what seed, data, layout and code a run is trained.

    Attributes:
        seed: keys every draw.
        data_name: of the data, for messages.
        data: count, fingerprint and sizes of the samples.
        layout: see :func:`layout_of`.
        commit: of the source, where it is known; rank 0's.
    """

    seed: int
    data_name: str
    data: dict[str, Any]
    layout: dict[str, Any]
    commit: str | None

    def to_json(self) -> dict[str, Any]:
        """Entries of state.json."""
        return {
            "version": __version__, "seed": self.seed, "data": self.data, "layout": self.layout, "commit": self.commit,
        }


def provenance_of(
    batch: BatchArguments, parallel: ParallelArguments, data: Blend, launch: LaunchEnvironment
) -> Provenance:
    """The provenance of the run that these flags make of these data."""
    info = data.info
    return Provenance(
        seed=batch.seed,
        data_name=data.name,
        data={"samples": len(data), "fingerprint": data.fingerprint, "frames": info.frames, "height": info.height,
              "width": info.width, "fps": info.fps},
        layout=layout_of(batch, parallel, launch.world_size),
        commit=source_commit() if launch.rank == 0 else None,
    )


def warn_of_changes(folder: Path, state: dict[str, Any], now: Provenance) -> None:
    """Say so where a run goes on with another seed or other data than the checkpoint's.

    Args:
        folder: the checkpoint.
        state: its :func:`load_training_state`.
        now: of the run that resumes.
    """
    if not state["iteration"]:  # converted weights know no run
        return
    if state["seed"] != now.seed:
        logger.warning("--seed is %d, but %s was trained with %d: draws and the order of samples change", now.seed,
                       folder, state["seed"], extra=AGREED)
    if state["data"]["fingerprint"] != now.data["fingerprint"]:
        logger.warning("%s was trained on other data than %s", folder, now.data_name, extra=AGREED)


def layout_of(batch: BatchArguments, parallel: ParallelArguments, world_size: int) -> dict[str, Any]:
    """Layout of the model and the batch, and their precision, for the record."""
    return {
        "processes": world_size,
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "global_batch_size": batch.global_batch_size,
        "precision": "bf16" if batch.bf16 else "fp32",
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


def checkpoint_to_resume(load: Path | None, peers: Peers) -> Path | None:
    """The newest good checkpoint in ``--load``, or the ``iter_*`` folder that it is; None starts anew. Collective.

    Raises:
        CheckpointError: the ``iter_*`` folder is damaged.
    """
    found = None if load is None else find_checkpoint(load, peers=peers)
    if found is None and load is not None:
        logger.info("%s holds no checkpoint: starting anew", load)
    return found
