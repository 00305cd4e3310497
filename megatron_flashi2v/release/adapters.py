"""``convert --to diffusers-lora`` and ``--to comfyui-lora``: an adapter by itself, from one form to another."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial

import torch

from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.conversion.adapters.adapter import Adapter, require_finite
from megatron_flashi2v.conversion.adapters.reading import FILES, open_adapter
from megatron_flashi2v.conversion.adapters.writing import caveats, is_ours, write_adapter
from megatron_flashi2v.conversion.comparison import as_bytes
from megatron_flashi2v.conversion.convert import require_apart
from megatron_flashi2v.conversion.weights import listed
from megatron_flashi2v.runtime.files import atomic_write_json, require_space, require_writable
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.runtime.publishing import require_replaceable, staged_folder

_OVERHEAD_BYTES = 1_000_000

logger = logging.getLogger(__name__)


def convert_adapter(config: ConvertConfig) -> Adapter:
    """Write an adapter in another form; its matrices and alphas stay what they are, bit for bit.

    Args:
        config: its source is the adapter, its target a form and the folder to write.

    Returns:
        The adapter that was read.

    Raises:
        UserError: the source is no adapter, is damaged, or holds more than pairs; the target exists, or is or holds the
            source. Nothing is left under the target's name then.
    """
    (form, path), (target_form, target) = config.source, config.target
    with logging_to_stderr():
        if config.report is not None:
            require_writable(config.report, "--report")
        if target.suffix in (".pt", ".pth", ".safetensors"):
            raise ConfigError(f"{target} must be a folder, which gets {FILES[target_form][0]}; leave out its ending")
        require_apart(path, target)
        require_replaceable(target, config.overwrite, partial(is_ours, form=target_form))
        adapter = open_adapter(path, form, config.weights)
        _require_pairs(adapter, target_form)
        require_finite(adapter)
        dtype = None if config.dtype == "keep" else getattr(torch, config.dtype)
        require_space(target, _nbytes(adapter) + _OVERHEAD_BYTES, "the conversion")
        with staged_folder(target, overwrite=config.overwrite) as folder:
            write_adapter(folder, adapter, target_form, dtype)
            if config.verify:
                require_equal(adapter, dataclasses.replace(open_adapter(folder), path=target), dtype)
        notes = caveats(adapter, target_form)
        logger.info("wrote %s: %s, from the form %s", target, adapter.summary, adapter.form)
        for note in notes:
            logger.info("note: %s", note)
        if config.report is not None:
            atomic_write_json(config.report, _report(config, adapter, notes))
    return adapter


def _require_pairs(adapter: Adapter, form: str) -> None:
    if adapter.whole:
        base = adapter.base.replace(":", " ", 1)
        raise CheckpointError(
            f"{adapter.path} holds {len(adapter.whole)} tensors that were trained whole "
            f"({listed(list(adapter.whole))}), which {form} cannot carry; for the full model: --from {base} "
            "--adapter THIS --merge"
        )


def _nbytes(adapter: Adapter) -> int:
    return sum(
        tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        for pairs in (adapter.pairs, adapter.low_noise) for pair in pairs.values() for tensor in pair.tensors
    )  # fmt: skip


def require_equal(adapter: Adapter, written: Adapter, dtype: torch.dtype | None = None) -> None:
    """Compare two adapters, layer by layer: alphas, and matrices bit by bit.

    Args:
        adapter: as it was read.
        written: in another form.
        dtype: in which it was written; None if unchanged.

    Raises:
        CheckpointError: names the first layer that differs.
    """
    for pairs, others in ((adapter.pairs, written.pairs), (adapter.low_noise, written.low_noise)):
        if pairs.keys() != others.keys():
            raise CheckpointError(f"{written.path} and {adapter.path} hold pairs of other layers")
        for layer, pair in pairs.items():
            if pair.alpha != others[layer].alpha:
                raise CheckpointError(f"{written.path}: {layer} has alpha {others[layer].alpha}, not {pair.alpha}")
            for first, second in zip(pair.tensors, others[layer].tensors, strict=True):
                expected, found = first.read().to(dtype or first.dtype), second.read()
                if expected.shape != found.shape or not torch.equal(as_bytes(expected), as_bytes(found)):
                    raise CheckpointError(f"{written.path}: a matrix of {layer} differs from {adapter.path}")


def _report(config: ConvertConfig, adapter: Adapter, notes: tuple[str, ...]) -> Mapping[str, object]:
    return {
        "source": (adapter.form, str(config.source[1])),
        "target": (config.target[0], str(config.target[1])),
        "pairs": [
            {layer: {"rank": pair.rank, "alpha": pair.alpha} for layer, pair in pairs.items()}
            for pairs in (adapter.pairs, adapter.low_noise)
        ],
        "notes": notes,
        "verified": config.verify,
    }
