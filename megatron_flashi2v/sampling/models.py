"""Which weights are sampled: one model's, or those of a pair of experts; found before any is loaded, and loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch

from megatron_flashi2v.config.clips import Interpolation
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.fields import spelling
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.conversion.experts import WHOLE, Range, other_expert, require_places, trained_range
from megatron_flashi2v.conversion.formats import diffusers
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.sampling.experts import LowNoise
from megatron_flashi2v.sampling.frozen import is_release
from megatron_flashi2v.sampling.guidance import VelocityFunction
from megatron_flashi2v.sampling.load import describe, load_stages, resolve_checkpoint, velocity_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LowNoiseFolder:
    """Where the second expert of a pair lies, and the sigma below which it is called."""

    folder: Path
    boundary_ratio: float


@dataclass(frozen=True, kw_only=True)
class FoundModels:
    """What ``--load`` and ``--low-noise`` name.

    Attributes:
        folder: of the model, or of a pair's expert for high noise; a checkpoint's weights are verified.
        config: of each of them.
        state: what the training of the first recorded.
        low_noise: the second expert; None for one model.
    """

    folder: Path
    config: ModelConfig
    state: Mapping[str, Any]
    low_noise: LowNoiseFolder | None


def find_models(
    load: Path, weights: str = "model", *, low_noise: Path | None = None, boundary_ratio: float | None = None
) -> FoundModels:
    """Find one model, or two that fit together.

    Args:
        load: checkpoint, or release; one of a pair has the second expert too.
        weights: ``model`` or ``ema``, of both.
        low_noise: checkpoint or release of the expert for low noise; of a pair's release, the second.
        boundary_ratio: None takes the release's, or the noise level at which the experts' training was divided.

    Raises:
        CheckpointError: there is none, or it is damaged; or an expert is given alone, or in the other's place.
        ConfigError: the experts have unlike settings, or their boundary is not known.
    """
    folder = _expert(resolve_checkpoint(load, weights), diffusers.TRANSFORMER)
    config, state = describe(folder)
    second = load if low_noise is None and _is_pair(load) else low_noise
    if second is None:
        if boundary_ratio is not None:
            raise ConfigError(
                f"--boundary-ratio {boundary_ratio:g} divides a pair of experts, but --load {load} is one model; give "
                "--low-noise too, or leave it out"
            )
        _require_whole(load, state)
        return FoundModels(folder=folder, config=config, state=state, low_noise=None)
    low_folder = _expert(resolve_checkpoint(second, weights), diffusers.SECOND_TRANSFORMER)
    low_config, low_state = describe(low_folder)
    _require_same(folder, config, low_folder, low_config)
    ranges = trained_range(state), trained_range(low_state)
    require_places(*((folder, low_folder) if second == load else (load, second)), ranges, ("--load", "--low-noise"))
    if boundary_ratio is None:
        boundary_ratio = _known_boundary((load, second), ranges)
    _warn_of_gaps(ranges, boundary_ratio)
    return FoundModels(
        folder=folder, config=config, state=state,
        low_noise=LowNoiseFolder(folder=low_folder, boundary_ratio=boundary_ratio),
    )


def interpolation_of(state: Mapping[str, Any], given: Interpolation | None = None) -> Interpolation:
    """How to resize images: as it is given, or as the training data were, or as FlashI2V's main branch does.

    Raises:
        CheckpointError: another one is recorded.
    """
    data = state.get("data")
    recorded = data.get("interpolation") if isinstance(data, Mapping) else None
    chosen: Any = given or recorded or "bicubic"
    if chosen not in get_args(Interpolation):
        raise CheckpointError(
            f"the training data's interpolation is recorded as {chosen!r}; give --interpolation, one of "
            f"{', '.join(get_args(Interpolation))}"
        )
    return cast("Interpolation", chosen)


def _is_pair(folder: Path) -> bool:
    return is_release(folder) and (folder / diffusers.SECOND_TRANSFORMER).is_dir()


def _expert(folder: Path, name: str) -> Path:
    """The transformer of that name in a pair's release; another folder as it is."""
    return folder / name if _is_pair(folder) else folder


def _require_whole(load: Path, state: Mapping[str, Any]) -> None:
    low, high = trained_range(state)
    other = other_expert(load)
    if other is not None:
        raise CheckpointError(
            f"--load {load} is one of a pair of experts, and {other} the other; give the release that holds both, or "
            "both of them: --load for high noise, --low-noise for low"
        )
    if (low, high) != WHOLE:
        raise CheckpointError(
            f"--load {load} was trained on noise levels from {low:g} to {high:g} alone, and sampling goes from 1 to 0; "
            "give both experts of the pair: --load for high noise, --low-noise for low"
        )


def _require_same(folder: Path, config: ModelConfig, low_folder: Path, low_config: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        first, second = (getattr(one, field.name) for one in (config, low_config))
        if first != second:
            raise ConfigError(
                f"--low-noise {low_folder}: its {field.name} is {second!r}, but that of --load {folder} is {first!r}; "
                "the experts of a pair have the same settings"
            )


def _known_boundary(places: tuple[Path, Path], ranges: tuple[Range, Range]) -> float:
    stated = diffusers.stated_boundary(*places)
    if stated is not None:
        return stated
    (high_from, _), (_, low_to) = ranges
    if high_from == low_to:
        return high_from
    raise ConfigError(
        f"{spelling('boundary_ratio')} must be given: neither a release nor the training of the experts tells the "
        "noise level that divides them; Wan2.2's is 0.9 (image to video) or 0.875 (text to video)"
    )


def _warn_of_gaps(ranges: tuple[Range, Range], boundary_ratio: float) -> None:
    """Warn of noise levels at which an expert is called, and was not trained."""
    (high_from, _), (_, low_to) = ranges
    if high_from > boundary_ratio or low_to < boundary_ratio:
        logger.warning(
            "the boundary ratio is %g, but the experts were trained on noise levels from %g and up to %g",
            boundary_ratio, high_from, low_to, extra=AGREED,
        )


def load_velocities(
    models: FoundModels, groups: Groups, device: Device, parallel: ParallelArguments, *,
    bases: tuple[tuple[str, Path] | None, tuple[str, Path] | None] = (None, None), **options: Any,
) -> tuple[VelocityFunction, LowNoise | None]:
    """This rank's part of the model, or of both experts, of which one at a time is on the device.

    Args:
        models: from :func:`find_models`.
        groups: see :func:`~megatron_flashi2v.sampling.load.load_stages`, here and for the following.
        device: where they compute.
        parallel: of each.
        bases: formats and paths of adapters' bases, the first expert's first; None for where they were in training.
        options: bf16, attention_backend, weights and adapter_scale.
    """
    if models.low_noise is None:
        stages = load_stages(models.folder, groups, device, parallel, base=bases[0], **options)
        return velocity_of(stages), None
    turns = TurnsOnDevice(device.torch_device)
    # The first called is loaded last, and so is there.
    low, high = (
        turns.add(partial(load_stages, folder, groups, device, parallel, base=base, base_flag=flag, **options))
        for folder, base, flag in (
            (models.low_noise.folder, bases[1], "--low-noise-base"), (models.folder, bases[0], "--base"),
        )
    )
    return high, LowNoise(velocity=low, boundary_ratio=models.low_noise.boundary_ratio)


class TurnsOnDevice:
    """Lets models share the device's memory: the one that was called last is there, the others in the host's memory.

    A pair of experts changes once in a video, and once more before the next: each change moves both models' weights,
    which is seconds where a video takes minutes.

    Args:
        device: where they compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stages: Sequence[DiffusionTransformer] = ()
        self._velocity: VelocityFunction

    def add(self, load: Callable[[], Sequence[DiffusionTransformer]]) -> VelocityFunction:
        """Load another model's stages onto the device, after the one that is there has left it; its velocity."""
        self._leave()
        stages = load()
        self._bring(stages)

        def velocity(*inputs: Any) -> torch.Tensor:
            if self._stages is not stages:
                self._leave()
                self._bring(stages)
            return self._velocity(*inputs)

        return velocity

    def _leave(self) -> None:
        for stage in self._stages:
            stage.to("cpu")

    def _bring(self, stages: Sequence[DiffusionTransformer]) -> None:
        for stage in stages:
            stage.to(self._device)
        # Anew: the memory of contexts, which lies on the device, goes with the model that leaves.
        self._stages, self._velocity = stages, velocity_of(stages)
