"""The frozen video VAE: diffusers' AutoencoderKLWan behind normalised latents.

Shapes: B batch, C channels, T frames or latent frames, H rows, W columns. Frames are not latent frames: a clip of
``1 + k * temporal_stride`` frames has ``1 + k`` latent frames. Strides are read from the VAE's structure; Wan 2.1 has
(4, 8, 8), other configurations differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.folders import model_folder, read_model_config, require_all_weights, require_files

CHUNK_FRAMES = 4
"""diffusers encodes the first frame and then chunks of four; frames that do not fill a chunk are silently lost."""


@dataclass(frozen=True)
class Strides:
    """Video frames and pixels for each latent frame after the first, and for each latent row and column."""

    temporal: int
    spatial: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Strides:
        """Those of an AutoencoderKLWan with this configuration."""
        return cls(
            temporal=2 ** sum(bool(halves) for halves in config["temperal_downsample"]),
            spatial=2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1),
        )

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a clip.

        Args:
            frames: video frames.
            height: pixels.
            width: pixels.

        Raises:
            ConfigError: the sizes do not fit the strides.
        """
        if frames < 1 or (frames - 1) % self.temporal:
            below = 1 + max(0, frames - 1) // self.temporal * self.temporal
            raise ConfigError(
                f"num_frames is {frames}; this VAE's temporal stride is {self.temporal}, so it must be "
                f"1 + k * {self.temporal}, such as {below} or {below + self.temporal}"
            )
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.spatial:
                raise ConfigError(
                    f"{name} is {size}; this VAE's spatial stride is {self.spatial}, so it must be a multiple "
                    f"of {self.spatial}"
                )
        return 1 + (frames - 1) // self.temporal, height // self.spatial, width // self.spatial


WAN_STRIDES = Strides(temporal=4, spatial=8)
"""Of Wan 2.1's VAE, which the released models take."""


def read_strides(folder: Path) -> Strides:
    """The strides of a VAE's folder, without its weights.

    Raises:
        ConfigError: ``config.json`` is missing or malformed, or of another model.
    """
    folder = model_folder(folder, "VAE")
    config = read_model_config(folder, "VAE")
    try:
        return Strides.of(config)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"VAE folder {folder}: config.json is not an AutoencoderKLWan's ({error!r})") from error


class VideoVAE:
    """Clips to normalised latents and back; no gradients.

    Args:
        model: an AutoencoderKLWan, loaded and on its device; it is put into evaluation mode.
        source: folder that it came from, for errors.
    """

    def __init__(self, model: Any, *, source: str) -> None:
        self._model = model.eval().requires_grad_(False)
        self._source = source
        config = model.config
        self.latent_channels: int = config.z_dim
        self.strides = Strides.of(config)
        self.temporal_stride, self.spatial_stride = self.strides.temporal, self.strides.spatial
        if CHUNK_FRAMES % self.temporal_stride:
            raise ConfigError(
                f"VAE {source}: temporal stride {self.temporal_stride}; diffusers encodes chunks of {CHUNK_FRAMES} "
                "frames, so it must be 1, 2 or 4"
            )
        self._mean_C111 = self._statistics("latents_mean")
        self._std_C111 = self._statistics("latents_std")

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> VideoVAE:
        """Read a diffusers folder (``config.json`` and safetensors weights), as :func:`model_folder` finds it.

        Args:
            folder: the VAE's folder, usually ``vae`` in a pipeline's folder.
            device: where it runs.
            dtype: of weights and computation; latents come out in fp32 all the same.

        Raises:
            ConfigError: a file is missing or malformed, or the folder holds another model.
        """
        folder = model_folder(Path(folder), "VAE")
        name = read_model_config(folder, "VAE").get("_class_name")
        if name != "AutoencoderKLWan":
            raise ConfigError(f"VAE folder {folder}: config.json names the class {name!r}; it must be AutoencoderKLWan")
        require_files(folder, "VAE", "*.safetensors")
        from diffusers import AutoencoderKLWan

        try:
            model, report = AutoencoderKLWan.from_pretrained(
                str(folder), torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(f"VAE folder {folder}: cannot be loaded ({error})") from error
        require_all_weights(folder, "VAE", report["missing_keys"])
        return cls(model.to(device), source=str(folder))

    def enable_tiling(self) -> None:
        """Encode and decode in tiles that overlap, as diffusers does: less memory, slightly other results."""
        self._model.enable_tiling()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the latents, JSON-ready: the configuration, the strides, and how the posterior is used."""
        config = {key: value for key, value in self._model.config.items() if not key.startswith("_")}
        return {
            "class": "AutoencoderKLWan",
            "config": {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
            "temporal_stride": self.temporal_stride,
            "spatial_stride": self.spatial_stride,
            "posterior": "mean",
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a clip's latents; arguments and errors are those of :meth:`Strides.latent_grid`."""
        return self.latent_channels, *self.strides.latent_grid(frames, height, width)

    @torch.no_grad()
    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Normalised posterior means ``(mu - mean) / std`` (FlashI2V's ``flashi2v/modules/vae.py``, branch main).

        The VAE is causal: ``encode(video)[:, :, :1]`` is ``encode(video[:, :, :1])``, the latents of the image
        condition.

        Args:
            video_BCTHW: RGB in [-1, 1]; 1 + k * temporal_stride frames.

        Returns:
            fp32 latents on the VAE's device.

        Raises:
            ConfigError: the sizes do not fit the strides.
        """
        frames, height, width = video_BCTHW.shape[2:]
        shape = self.latent_shape(frames, height, width)
        video_BCTHW = video_BCTHW.to(self._model.device, self._model.dtype)
        # Whole chunks; being causal, the latents of the real frames do not see the repeated ones.
        missing = -(frames - 1) % CHUNK_FRAMES
        if missing:
            repeated_BCTHW = video_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)
            video_BCTHW = torch.cat((video_BCTHW, repeated_BCTHW), dim=2)
        mean_BCTHW = self._model.encode(video_BCTHW).latent_dist.mode()[:, :, : shape[1]].float()
        return (mean_BCTHW - self._mean_C111) / self._std_C111

    def encode_with_grey(self, image_BC1HW: torch.Tensor, frames: int) -> torch.Tensor:
        """Normalised latents [B, C, T, H, W] of clips that show an image and then mid grey, as :meth:`encode`'s.

        Args:
            image_BC1HW: RGB in [-1, 1].
            frames: of the clip, with the image.
        """
        return self.encode(torch.nn.functional.pad(image_BC1HW, (0, 0, 0, 0, 0, frames - 1)))

    @torch.no_grad()
    def decode(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """The reverse of :meth:`encode`: RGB in [-1, 1], fp32, ``1 + (T - 1) * temporal_stride`` frames."""
        latents_BCTHW = latents_BCTHW.to(self._model.device, torch.float32) * self._std_C111 + self._mean_C111
        return self._model.decode(latents_BCTHW.to(self._model.dtype)).sample.float().clamp(-1.0, 1.0)

    def _statistics(self, name: str) -> torch.Tensor:
        values = self._model.config[name]
        if len(values) != self.latent_channels:
            raise ConfigError(
                f"VAE {self._source}: {name} has {len(values)} values in config.json for {self.latent_channels} "
                "latent channels (z_dim)"
            )
        return torch.tensor(values, dtype=torch.float32, device=self._model.device).view(-1, 1, 1, 1)
