"""The model card: what a release is and how it was trained, from the facts of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.key_table import parameter_count
from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.conversion.weights import Weights
from megatron_flashi2v.version import __version__

CARD_NAME = "README.md"

_HEAD = """---
library_name: megatron_flashi2v
pipeline_tag: {tag}
{stated}tags:
- megatron_flashi2v
- diffusers
- {conditioning}
---

# {title}

{kind} diffusion transformer, trained with megatron_flashi2v and exported from the format {source_format}.

    pip install "megatron-flashi2v>={version}"    # or `pip install -e .` in a checkout of its source

A diffusers pipeline, whose class is in that package:

    from megatron_flashi2v import FlashI2VPipeline

    pipeline = FlashI2VPipeline.from_pretrained(FOLDER)
    frames = pipeline({call}).frames[0]

`transformer/` is a plain `WanTransformer3DModel`, and loads by `WanTransformer3DModel.from_pretrained`. The solver is
Euler's; `UniPCMultistepScheduler.from_config(pipeline.scheduler.config)` as `pipeline.scheduler` needs fewer steps.

## Licence

{licence}
"""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What no checkpoint knows of a release.

    Attributes:
        license: of the weights, by the Hub's identifier, such as ``apache-2.0``.
        base_model: Hub repository that the training started from.
        boundary_ratio: of a pair of experts.
    """

    license: str | None = None
    base_model: str | None = None
    boundary_ratio: float | None = None


def model_card(weights: Weights, source_format: str, references: Mapping[str, str], origin: Origin) -> str:
    """The text of ``README.md``; leaves out facts that the checkpoint does not hold.

    Args:
        weights: their configuration and facts.
        source_format: of the weights before the conversion.
        references: components that lie elsewhere, by name.
        origin: what the checkpoint does not know.
    """
    config, facts = weights.config, weights.facts
    paradigm = paradigm_of(config)
    image = paradigm.uses_image
    stated = {"license": origin.license, "base_model": origin.base_model}
    text = _HEAD.format(
        stated="".join(f"{key}: {value}\n" for key, value in stated.items() if value is not None),
        version=__version__,
        licence=f"`{origin.license}`, as whoever made this release states."
        if origin.license is not None
        else "None was stated when this release was made: ask its owner before you use it.",
        tag="image-to-video" if image else "text-to-video",
        conditioning=config.conditioning,
        title=f"{'Image' if image else 'Text'}-to-video model ({config.conditioning})",
        kind="An image-to-video" if image else "A text-to-video",
        source_format=source_format,
        call='image=image, prompt="..."' if image else 'prompt="..."',
    )
    model = {
        "parameters": f"{parameter_count(config):,}",
        "blocks, width, feed-forward width, heads": f"{config.num_layers}, {config.hidden_size}, "
        f"{config.ffn_hidden_size}, {config.num_attention_heads}",
        "paradigm": config.conditioning,
        **({} if origin.boundary_ratio is None else _experts(origin.boundary_ratio)),
        **({"base model": origin.base_model} if origin.base_model is not None else {}),
        "precision of the weights": ", ".join(sorted({_dtype(weights, name) for name in weights.names})),
        "text": f"{config.text_length} rows of {config.text_dim}; cleaning `{config.text_cleaning}`",
        **paradigm.card_rows(config),
    }
    sections = [text, _table("Model", model)]
    training = _training(facts)
    if training:
        sections.append(_table("Training", training))
    if references:
        sections.append(_table("Components from elsewhere", dict(references)))
    return "\n".join(sections)


def _experts(boundary_ratio: float) -> dict[str, str]:
    first = f"{1000 * boundary_ratio:g}"
    return {"experts": f"two: `transformer/` for timesteps from 1000 to {first}, `transformer_2/` for those below"}


def _dtype(weights: Weights, name: str) -> str:
    return str(weights.dtype(name)).removeprefix("torch.")


def _training(facts: Mapping[str, Any]) -> dict[str, str]:
    if not facts.get("iteration"):  # converted weights know no run
        return {}
    rows = {"steps": f"{facts['iteration']:,}"}
    if "consumed_samples" in facts:
        rows["samples seen"] = f"{facts['consumed_samples']:,}"
    started = facts.get("config")
    if isinstance(started, Mapping) and started.get("load_weights"):
        # Only the last part of a path: the rest is a machine's.
        name, _, path = str(started["load_weights"]).partition(":")
        rows["initial weights"] = f"`{Path(path).name}`, format {name}"
    data, layout = facts.get("data"), facts.get("layout")
    if isinstance(data, Mapping):
        size = [data.get(key) for key in ("frames", "height", "width", "fps")]
        clips = f"{data.get('samples', '?')} clips of {size[0]} frames"
        rows["data"] = f"{clips} of {size[1]} x {size[2]} pixels at {size[3]} per second"
        rows["fingerprint of the data"] = f"`{data.get('fingerprint')}`"
    if isinstance(layout, Mapping):
        rows["layout"] = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in layout.items())
    for key, title in (("seed", "seed"), ("version", "megatron_flashi2v"), ("commit", "commit")):
        if facts.get(key) is not None:
            rows[title] = str(facts[key])
    return rows


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    return "\n".join(lines)
