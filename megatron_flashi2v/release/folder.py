"""Turn a converted folder into a release: frozen parts, the pipeline's defaults, and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.conversion.formats.diffusers import PIPELINE_DEFAULTS, PIPELINE_NAME, REFERENCES
from megatron_flashi2v.conversion.weights import NEGATIVE_PROMPT, Weights
from megatron_flashi2v.release.components import Component
from megatron_flashi2v.release.model_card import CARD_NAME, Origin, model_card
from megatron_flashi2v.runtime.files import atomic_write_json, atomic_write_text, read_json_object


def finish_release(
    folder: Path,
    weights: Weights,
    components: Sequence[Component],
    *,
    copied: bool,
    source_format: str,
    origin: Origin,
    negative_prompt: str | None = None,
) -> None:
    """Turn a folder of the format diffusers into a release.

    Args:
        folder: just written, not published yet.
        weights: the weights in it.
        components: its frozen parts; without them, users give theirs to ``from_pretrained``.
        copied: copy the parts that lie in folders; otherwise name them in ``model_index.json``, as Hub repositories
            always are.
        source_format: of the weights before the conversion.
        origin: for the card.
        negative_prompt: of the release; None takes the weights' own, and without one leaves users ours.
    """
    index = read_json_object(folder / PIPELINE_NAME, error=CheckpointError)
    references: dict[str, str] = {}
    for component in components:
        if copied and component.folder is not None:
            component.copy(folder / component.name)
            index[component.name] = [component.library, component.class_name]
        else:
            references[component.name] = component.reference
    if references:
        index[REFERENCES] = references
    data = weights.facts.get("data")
    if isinstance(data, Mapping):
        index |= {name: data[key] for name, key in PIPELINE_DEFAULTS.items() if key in data}
    negative_prompt = weights.facts.get(NEGATIVE_PROMPT) if negative_prompt is None else negative_prompt
    if negative_prompt is not None:
        index[NEGATIVE_PROMPT] = negative_prompt
    atomic_write_json(folder / PIPELINE_NAME, index)
    atomic_write_text(folder / CARD_NAME, model_card(weights, source_format, references, origin))
