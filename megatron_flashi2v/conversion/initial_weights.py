"""The weights that a new run starts from, in any format: each rank reads the parts of tensors that it holds."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from megatron_flashi2v.checkpoint.folders import require_same_model
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.checkpoint.model_state import NamedParameters
from megatron_flashi2v.config.model import BASE_PARADIGM, FREE_OF_WEIGHTS, PARADIGM_FIELDS, ModelConfig
from megatron_flashi2v.conversion.convert import open_weights
from megatron_flashi2v.conversion.weights import ReadOptions, Weights
from megatron_flashi2v.models.placement import parameter_box
from megatron_flashi2v.parallel.placement import ShardGrid

PATCH_WEIGHT = "patch_embedding.weight"
# What any paradigm can start from: models whose patch embedding takes the latents alone.
_STARTS = (BASE_PARADIGM, "flashi2v")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Where a run's first weights come from, and what they cover.

    Attributes:
        weights: opened, not read.
        missing: tensors of the run's model that they lack, which stay as initialised.
        unexpected: tensors that they hold and the run's model has no place for.
    """

    weights: Weights
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line for the log."""
        parts = [f"starting from the weights of {self.weights.source} ({self.weights.config.conditioning})"]
        if self.missing:
            missing = ", ".join(self.missing)
            parts.append(f"{len(self.missing)} tensors are missing and start as initialised ({missing})")
        if self.unexpected:
            unexpected = ", ".join(self.unexpected)
            parts.append(f"{len(self.unexpected)} are unexpected and left out ({unexpected})")
        return "; ".join((*parts, *self.weights.notes))


def open_initial_weights(source: tuple[str, Path], model: ModelConfig, weights: str = "model") -> InitialWeights:
    """Open what a run will start from, and compare it with the run's model.

    Text-to-video and FlashI2V weights suit every paradigm; others only their own.

    Args:
        source: format and path.
        model: the run's; it gives the heads and phi's order where the source does not tell.
        weights: ``model`` or ``ema``.

    Raises:
        UserError: the source is missing or damaged, or of another paradigm or other widths.
    """
    opened = open_weights(*source, ReadOptions(weights=weights, assume=model))
    found = opened.config
    starts = found.conditioning in _STARTS and found.conditioning != model.conditioning
    conditioning = BASE_PARADIGM if found.conditioning != model.conditioning else model.conditioning
    compared = dataclasses.replace(found, conditioning=BASE_PARADIGM) if starts else found
    # What shapes no weight that is taken over may differ.
    free = FREE_OF_WEIGHTS if found.conditioning == model.conditioning else FREE_OF_WEIGHTS + PARADIGM_FIELDS
    if found.phi_kernel_size[0] == 1:  # without a kernel over time both orders are the same
        free = (*free, "phi_order")
    wanted = {name: getattr(compared, name) for name in free}
    require_same_model(compared, dataclasses.replace(model, conditioning=conditioning, **wanted), source[1])
    have, want = parameter_shapes(found), parameter_shapes(model)
    return InitialWeights(
        weights=opened,
        missing=tuple(name for name in want if name not in have),
        unexpected=tuple(name for name in have if name not in want),
    )


def load_initial_weights(initial: InitialWeights, named_parameters: NamedParameters, grid: ShardGrid) -> None:
    """Fill this rank's parameters in place, as far as the weights cover them.

    Columns of the patch embedding for channels that the run's paradigm adds stay as they are.

    Args:
        initial: from :func:`open_initial_weights`.
        named_parameters: global names and this rank's parameters.
        grid: this rank's place.

    Raises:
        CheckpointError: a file is damaged.
    """
    shapes = parameter_shapes(initial.weights.config)
    for name, parameter in named_parameters:
        if name not in shapes:
            continue
        part = parameter_box(name, parameter.shape, grid)
        slices, target = part.slices, parameter.detach()
        if name == PATCH_WEIGHT and part.global_shape != shapes[name]:
            columns = shapes[name][1]
            slices, target = (slices[0], slice(0, columns)), target[:, :columns]
        target.copy_(initial.weights.read(name, slices, parameter.dtype))
