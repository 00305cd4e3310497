"""The data that a run's flags name, opened and checked."""

from __future__ import annotations

from megatron_flashi2v.config.blend import parse_blend
from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.data.prepared import PreparedDataset


def open_data(config: TrainConfig) -> Blend:
    """Open the prepared data sets of ``--data-path``.

    Raises:
        ConfigError: no path was given, or the data sets do not belong together.
        DataError: one is missing, damaged or empty.
    """
    parts = parse_blend(config.data.data_path)
    datasets = []
    for part in parts:
        if part.folder.is_file():
            raise DataError(f"--data-path {part.folder} is a file; give the folder that `flashi2v prepare` wrote")
        dataset = PreparedDataset(part.folder)
        if not len(dataset):
            raise DataError(f"--data-path {part.folder} holds no samples; prepare it again")
        datasets.append(dataset)
    return Blend(
        datasets, [part.weight for part in parts], batch=config.batch.global_batch_size, seed=config.batch.seed
    )
