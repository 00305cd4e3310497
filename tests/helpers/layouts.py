"""Run a layout, and compare it with another: losses, gradients, weights."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers.ranks import run_ranks
from helpers.run_plan import run_plan
from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.checkpoint.storage import TensorPiece, read_index, read_pieces


@dataclass(frozen=True)
class Layout:
    """One run.

    Attributes:
        name: of the ``--save`` folder.
        world: processes.
        flags: what makes the layout.
        replicas: how many share a global batch.
        bug: of ``planted_bugs.BUGS``, to be planted.
        fault: of ``planted_faults.FAULTS``, to be planted.
        saves_again: only load (by the flags) and save.
    """

    name: str
    world: int
    flags: tuple[str, ...] = ()
    replicas: int = 1
    bug: str | None = None
    fault: str | None = None
    saves_again: bool = False


def run_layouts(layouts: list[Layout], folder: Path, common: list[str], timeout: int = 900) -> dict[str, Path]:
    """Train every layout, one launch per world size; the ``--save`` folder of each by name."""
    saves = {layout.name: folder / layout.name for layout in layouts}
    for world in sorted({layout.world for layout in layouts}):
        plan = [
            replace(layout, flags=(*common, *layout.flags, "--save", str(saves[layout.name])))
            for layout in layouts if layout.world == world
        ]
        run_ranks(run_plan, world, folder, plan, timeout=timeout)
    return saves


def metrics(save: Path) -> list[dict]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def without_times(row: dict) -> dict:
    """What of a row is the same however fast the machine is."""
    measured = ("step_time_s", "samples_per_s", "tokens_per_s", "tflops", "mfu", "data_wait_s", "memory_gb")
    return {name: value for name, value in row.items() if name not in measured}


@functools.lru_cache(maxsize=64)
def tensors(folder: Path, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """Whole tensors of a sharded folder by key; references are read once for all that is compared with them."""
    index = read_index(folder)  # once: it is long where ranks divide tensors
    found = {key: torch.empty(stored.shape, dtype=stored.dtype)
             for key, stored in index.tensors.items() if key.startswith(prefix)}
    read_pieces(folder, [TensorPiece.whole(key, tensor) for key, tensor in found.items()], index=index)
    return found


def weights(save: Path) -> dict[str, torch.Tensor]:
    """Whole weights of a run's last checkpoint."""
    folder = find_checkpoint(save)
    assert folder is not None
    return tensors(folder)


def assert_same_metrics(run: Path, reference: Path, relative: float = 1e-5) -> None:
    """Every iteration's loss and gradient norm agree."""
    rows, expected = metrics(run), metrics(reference)
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in expected]
    for row, want in zip(rows, expected, strict=True):
        for name in ("loss", "grad_norm"):
            error = abs(row[name] - want[name]) / abs(want[name])
            assert error <= relative, f"{run.name}: {name} of iteration {row['iteration']} is {error:.1e} off"


def assert_same_gradients(run: Path, reference: Path, relative: float = 1e-4) -> None:
    """The last iteration's gradients agree, tensor by tensor, in relative L2 norm."""
    found, expected = tensors(run / "gradients"), tensors(reference / "gradients")
    assert found.keys() == expected.keys()
    scale = max(gradient.norm() for gradient in expected.values())
    for name, want in expected.items():
        assert want.norm() > 0, f"{name} has no gradient, so it proves nothing"
        # Rounding of large gradients reaches small ones: a millionth of the largest is allowed on top.
        error = (found[name] - want).norm()
        assert error <= relative * want.norm() + 1e-7 * scale, f"{run.name}: gradient of {name} is {error:.1e} off"


def assert_ranks_agree(run: Path) -> None:
    """What several ranks hold copies of, last gradients and weights, is bit for bit the same on all of them."""
    found = json.loads((run / "disagreements.json").read_text())
    assert not found, f"{run.name}: ranks hold different copies of {', '.join(found)}"


def assert_same_velocity(run: Path, reference: Path) -> None:
    """The trained models predict the same velocity for the same noisy latents."""
    found, expected = (load_file(folder / "velocity.safetensors")["velocity"] for folder in (run, reference))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def assert_same_weights(run: Path, reference: Path) -> None:
    """Weights differ per tensor by at most 1e-5 |w| + 1e-8 sqrt(n) in L2 norm."""
    found, expected = weights(run), weights(reference)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error, allowed = (found[name] - want).norm(), 1e-5 * want.norm() + 1e-8 * want.numel() ** 0.5
        assert error <= allowed, f"{run.name}: {name} is {error:.1e} off, {allowed:.1e} allowed"
