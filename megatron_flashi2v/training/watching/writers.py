"""Rows of figures to metrics.jsonl, validation.jsonl, evaluation.jsonl, TensorBoard and Weights & Biases.

A service that fails is left out from then on, and the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.config.watch import WatchArguments
from megatron_flashi2v.runtime.files import atomic_write_text
from megatron_flashi2v.training.metrics import METRICS_FILE, MetricsLog
from megatron_flashi2v.training.sigma_buckets import BUCKETS
from megatron_flashi2v.training.watching.observer import Observer, Row

TRAINING, VALIDATION, EVALUATION = "train", "validation", "evaluation"
"""Kinds of rows, as curves name them."""
FILES = {TRAINING: METRICS_FILE, VALIDATION: "validation.jsonl", EVALUATION: "evaluation.jsonl"}
"""Under ``--save``."""
WANDB_RUN_FILE = "wandb_run_id.txt"
"""Under ``--save``: the run that a resumed one goes on with."""

logger = logging.getLogger(__name__)


class Curves(Protocol):
    """A service that shows figures over iterations."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Take the figures of one iteration, by name; ``/`` in a name groups them."""

    def close(self) -> None:
        """Write what is still held back."""


def require_packages(arguments: WatchArguments) -> None:
    """Refuse to start where a writer's package is missing.

    Raises:
        ConfigError: names the flag and what to install.
    """
    wanted = {
        "tensorboard": ("--tensorboard-dir", arguments.tensorboard_dir),
        "wandb": ("--wandb-project", arguments.wandb_project),
    }
    for package, (flag, value) in wanted.items():
        if value is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{flag} {value} needs the package {package}, which is not installed; pip install {package}, or leave "
                "the flag out"
            )


class TensorBoardCurves:
    """TensorBoard's event files.

    Args:
        config: is shown as text.
        folder: where they go.
        iteration: what earlier files in the folder hold past it is not shown.
    """

    def __init__(self, config: TrainConfig, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=iteration + 1)
        settings = yaml.safe_dump(flat_values(config), sort_keys=False)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in settings.splitlines()), iteration)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """One point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush the files."""
        self._writer.close()


class WandbCurves:
    """A run at Weights & Biases; a resumed run continues the earlier one that the same ``--save`` names.

    Args:
        config: is shown with the run.
        project: where it is listed.
        folder: ``--save``.
        iteration: the run goes on from here.
    """

    def __init__(self, config: TrainConfig, project: str, folder: Path | None, iteration: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        file = None if folder is None else folder / WANDB_RUN_FILE
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        known = file.read_text().strip() if file is not None and iteration and file.exists() else None
        self._run = wandb.init(
            project=project, id=known, resume="allow" if known else None, config=flat_values(config),
            dir=None if folder is None else str(folder),
        )
        if file is not None:
            atomic_write_text(file, f"{self._run.id}\n")
        # Its own steps never go back; a resumed run's iterations do.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """One point of each curve."""
        self._run.log({**values, "iteration": iteration})

    def close(self) -> None:
        """Upload the rest."""
        self._run.finish()


class Writers(Observer):
    """Writes rows to ``--save`` and to the services that the flags ask for; of rank 0 alone, the others write nothing.

    Args:
        config: names the services, which are shown it.
        iteration: the run goes on from here; rows of later iterations, which files may hold, are dropped.
        writes: whether this rank does.
    """

    def __init__(self, config: TrainConfig, iteration: int, *, writes: bool) -> None:
        folder = config.checkpoint.save if writes else None
        self._logs = {kind: MetricsLog(folder, iteration, name) for kind, name in FILES.items()}
        self._curves: dict[str, Curves] = {}
        board, project = config.watch.tensorboard_dir, config.watch.wandb_project
        if board is not None and writes:
            self._open("--tensorboard-dir", lambda: TensorBoardCurves(config, board, iteration))
        if project is not None and writes:
            self._open("--wandb-project", lambda: WandbCurves(config, project, folder, iteration))

    def last_iteration(self, kind: str) -> int:
        """Of the rows of that kind that an earlier run left; 0 where it left none."""
        return self._logs[kind].last_iteration or 0

    def after_iteration(self, row: Row) -> None:
        """Write the row to metrics.jsonl."""
        self.write(TRAINING, row)

    def write(self, kind: str, row: Row) -> None:
        """Append a row to the file of its kind, and show its figures, named ``kind/figure``."""
        self._logs[kind].append(row)
        if self._curves:
            values = {f"{kind}/{name}": value for name, value in scalars_of(row).items()}
            self._each(lambda curves: curves.scalars(values, row["iteration"]))

    def close(self) -> None:
        """Write what is still held back."""
        self._each(lambda curves: curves.close())
        self._curves = {}

    def _open(self, flag: str, make: Callable[[], Curves]) -> None:
        try:
            self._curves[flag] = make()
        except Exception as error:  # a service that is away, a full disk: in many ways
            _warn(flag, error)

    def _each(self, action: Callable[[Curves], None]) -> None:
        for flag, curves in list(self._curves.items()):
            try:
                action(curves)
            except Exception as error:
                _warn(flag, error)
                del self._curves[flag]


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row under flat names; what is None is left out, and a word, such as why, becomes 1."""
    values: dict[str, float] = {}
    for name, value in row.items():
        if name in ("iteration", "samples_by_sigma"):
            continue
        if isinstance(value, Mapping):
            parts = {f"{name}/{part}": number for part, number in value.items()}
        elif isinstance(value, (list, tuple)):
            parts = {
                f"{name}/{index / BUCKETS:.3f}-{(index + 1) / BUCKETS:.3f}": number
                for index, number in enumerate(value)
            }
        else:
            parts = {name: value}
        values.update({
            part: 1.0 if isinstance(number, str) else float(number)
            for part, number in parts.items() if number is not None
        })
    return values


def _warn(flag: str, error: Exception) -> None:
    what = (str(error).splitlines() or [""])[0]
    logger.warning("%s: %s: %s; the run goes on without it", flag, type(error).__name__, what)
