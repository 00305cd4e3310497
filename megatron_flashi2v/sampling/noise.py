"""Sampling's draws, which depend on the seed and on the sample's key alone; and noise from a file.

A sample's key is its place in the user's list, or the id of its request.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_flashi2v.conditioning.interface import ImageConditioning, stack_extras
from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.runtime.random import keyed_generator

NOISE_PURPOSE = "sample-noise"
FLOATS = ("F64", "F32", "F16", "BF16")


def sample_noise(seed: int, keys: Sequence[int | str], latent_shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise for some samples.

    Every sample's noise comes from its own host generator, keyed by (seed, its key): its batch, rank and device do
    not change it, and two samples never share noise.

    Args:
        seed: the sampling seed.
        keys: of the samples, one per row of the result: places in the user's list, or ids.
        latent_shape: (C, T, H, W) of one sample's latents.

    Returns:
        fp32 ``[len(keys), C, T, H, W]`` on the host.
    """
    return torch.stack(
        [
            torch.randn(
                tuple(latent_shape),
                generator=keyed_generator(seed, NOISE_PURPOSE, key),
                dtype=torch.float32,
            )
            for key in keys
        ]
    )


def sample_extras(
    paradigm: type[ImageConditioning],
    settings: ImageSettings,
    seed: int,
    keys: Sequence[int | str],
    latent_shape: Sequence[int],
) -> dict[str, torch.Tensor]:
    """The paradigm's settings and draws for the same samples, one row each, on the host; keyed as the noise is.

    Args:
        paradigm: of the model.
        settings: the user's.
        seed: as of :func:`sample_noise`, like the next two.
        keys: of the samples.
        latent_shape: (C, T, H, W) of one sample's latents.
    """
    channels, _, height, width = latent_shape

    def row(key: int | str) -> dict[str, torch.Tensor]:
        return paradigm.sampling_extras(
            settings,
            (channels, 1, height, width),
            lambda purpose: keyed_generator(seed, f"sample-{purpose}", key),
        )

    return stack_extras([row(key) for key in keys])


class NoiseFile:
    """Noise of the user's: a safetensors file with a tensor ``[C, T, H, W]`` or ``[1, C, T, H, W]`` for each video.

    Args:
        path: only its header is read.

    Raises:
        DataError: the file cannot be read, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self._shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self._dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise DataError(f"--noise {path}: cannot be read ({error}); give a .safetensors file") from error

    def find(self, name: str | None, latent_shape: Sequence[int]) -> str:
        """Name of a video's tensor, which has the size of its latents.

        Args:
            name: of the video; None for the only one.
            latent_shape: (C, T, H, W).

        Raises:
            DataError: there is no such tensor, or it has another size or no floating dtype.
        """
        if name is None:
            if len(self._shapes) != 1:
                raise DataError(f"--noise {self._path}: holds {len(self._shapes)} tensors; one video takes one")
            (name,) = self._shapes
        if name not in self._shapes:
            raise DataError(f"--noise {self._path}: holds no tensor {name!r}; give one for each video, by its name")
        shape, wanted = self._shapes[name], tuple(latent_shape)
        if shape not in (wanted, (1, *wanted)) or self._dtypes[name] not in FLOATS:
            raise DataError(
                f"--noise {self._path}: {name} is {self._dtypes[name]} {list(shape)}; it must be floating "
                f"{list(wanted)}, as the video's latents"
            )
        return name

    def read(self, name: str) -> torch.Tensor:
        """Noise fp32 ``[1, C, T, H, W]`` on the host."""
        with safe_open(self._path, framework="pt") as file:
            noise = file.get_tensor(name).float()
        return noise if noise.ndim == 5 else noise.unsqueeze(0)
