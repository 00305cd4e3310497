"""A small prepared data set of random numbers, written without encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from megatron_flashi2v.data.description import DataInfo, write_description
from megatron_flashi2v.data.shards import SHARD_FOLDER, ShardWriter


def write_synthetic(
    folder: Path | str,
    num_samples: int,
    latent_shape: Sequence[int],
    text_dim: int,
    text_length: int,
    seed: int,
    *,
    samples_per_shard: int = 4,
    text_cleaning: str = "full",
    inputs: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Path:
    """Write a data set that PreparedDataset opens; sample ``i`` depends on (seed, i) alone.

    Args:
        folder: made if missing.
        num_samples: samples in all.
        latent_shape: (C, T, H, W).
        text_dim: width of a text row.
        text_length: most rows of a caption; the samples have 1 to ``text_length`` rows.
        seed: of the random numbers.
        inputs: shapes of further tensors of each sample, by name.
    """
    folder = Path(folder)
    shards = folder / SHARD_FOLDER
    shards.mkdir(parents=True, exist_ok=True)
    channels, frames, height, width = latent_shape
    indices = []
    for number, first in enumerate(range(0, num_samples, samples_per_shard)):
        writer = ShardWriter(shards, number)
        for sample in range(first, min(first + samples_per_shard, num_samples)):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
            rows = int(torch.randint(1, text_length + 1, (1,), generator=generator))
            tensors = {
                "latents": torch.randn(tuple(latent_shape), generator=generator),
                "text": torch.randn((rows, text_dim), generator=generator).to(torch.bfloat16),
            }
            # Last, so that the others are the same without them.
            tensors.update({name: torch.randn(shape, generator=generator) for name, shape in inputs.items()})
            writer.add(f"synthetic-{sample:06d}", tensors, {"caption": f"caption {sample}"})
        indices.append(writer.publish(fingerprint="synthetic", dropped=[], seconds=0.0))
    info = DataInfo(
        latent_shape=(channels, frames, height, width),
        text_dim=text_dim,
        text_length=text_length,
        text_cleaning=text_cleaning,
        fps=16.0,
        frames=1 + 4 * (frames - 1),
        height=8 * height,
        width=8 * width,
        inputs=dict(inputs),
    )
    empty = torch.randn((1, text_dim), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    write_description(
        folder, info=info, settings={}, fingerprint="synthetic", indices=indices, empty_text_rows_LD=empty
    )
    return folder
