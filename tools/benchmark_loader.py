"""Measures the cost of loading: training from shards against training from one sample in memory.

    python tools/benchmark_loader.py --data-path runs/quickstart/data [any flags of `flashi2v train`]

One process trains from both in turns, so that other load on the machine affects both, and prints the throughputs' ratio
as JSON. On a busy machine the ratio of CPU times (of all threads, so that reading ahead counts) is more exact than that
of wall-clock times.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_flashi2v.config.recipe import parse
from megatron_flashi2v.config.rules import check_train
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import resolve_model
from megatron_flashi2v.runtime.launch import detect_launch

if TYPE_CHECKING:
    from megatron_flashi2v.data.blend import SampleSource
    from megatron_flashi2v.data.prepared import BadSample, PreparedSample

ROUNDS = 12
ITERATIONS = 10
"""Counted iterations of one round from one source."""
UNCOUNTED = 5
"""Iterations before them, which find the read-ahead full."""


class HeldSample:
    """A data set that returns the same sample, from memory, for every index."""

    is_collective = False

    def __init__(self, dataset: SampleSource) -> None:
        self.info, self.fingerprint, self.name = dataset.info, dataset.fingerprint, dataset.name
        self.empty_text_rows_LD = dataset.empty_text_rows_LD
        self._count, self._sample = len(dataset), dataset.fetch([0])[0]

    def __len__(self) -> int:
        return self._count

    def fetch(self, indices: Sequence[int]) -> list[PreparedSample | BadSample]:
        """The held sample, once for each index."""
        return [self._sample] * len(indices)

    def close(self) -> None:
        """Nothing is open."""


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    config = parse(TrainConfig, argv, prog="benchmark_loader", description="Measure the cost of loading from shards.")
    model, launch = resolve_model(config.model), detect_launch(os.environ)
    check_train(config, model, launch.world_size)
    from megatron_flashi2v.data.blend import Blend
    from megatron_flashi2v.training.run import entered_run

    with entered_run(config, model, launch) as trainer:
        from megatron_flashi2v.training.reading import training_source

        for wrapped in trainer.state.models:
            wrapped.train()
        data = trainer.source.data
        held = Blend([HeldSample(data.datasets[0])], [1.0], batch=data.batch, seed=config.batch.seed)
        sources = {"shards": trainer.source, "held": training_source(config, held, trainer.state, trainer.step)}
        position = dict.fromkeys(sources, 0)
        for source in sources.values():
            source.end = None
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        cpu_seconds = dict.fromkeys(sources, 0.0)
        for _ in range(ROUNDS):
            for name, source in sources.items():
                trainer.source = source
                for iteration in range(ITERATIONS + UNCOUNTED):
                    began = time.process_time()
                    trainer.state.consumed_samples = position[name]
                    row = trainer.run_iteration()
                    position[name] = trainer.state.consumed_samples
                    if iteration >= UNCOUNTED:
                        seconds[name].append(row["step_time_s"])
                        cpu_seconds[name] += time.process_time() - began
        for source in sources.values():
            source.close()
    totals = {name: sum(values) for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "throughput_ratio": totals["held"] / totals["shards"],
        "throughput_ratio_of_medians": medians["held"] / medians["shards"],
        "cpu_time_ratio": cpu_seconds["held"] / cpu_seconds["shards"],
        "samples_per_s": {name: config.batch.global_batch_size / median for name, median in medians.items()},
        "iterations": ROUNDS * ITERATIONS,
    }
    if launch.rank == 0:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
