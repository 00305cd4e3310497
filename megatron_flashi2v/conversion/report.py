"""Report of a conversion, tensor by tensor: a few lines for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.conversion.weights import Weights, listed


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One tensor of the model.

    Attributes:
        source: its names in the source; several where the source holds it in parts.
        target: its names in the target.
        shape: in our arrangement.
        stored: dtypes in the source.
        written: dtype in the target.
        sha256: of its written bytes, in our arrangement; empty unless both sides were compared.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    shape: tuple[int, ...]
    stored: tuple[str, ...]
    written: str
    sha256: str

    @property
    def renamed(self) -> bool:
        """Whether its name or its division into parts changed."""
        return self.source != self.target

    @property
    def cast(self) -> bool:
        """Whether its precision changed."""
        return any(dtype != self.written for dtype in self.stored)


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """A whole conversion.

    Attributes:
        source: format and path.
        target: format and path.
        model: the model's configuration.
        tensors: every tensor of the model, by our name.
        left_out: other entries of the source.
        non_finite: numbers of values that are NaN or infinite and were kept, by the source's tensor.
        notes: assumptions and caveats.
        verified: whether both sides were read again and compared.
        forward: result of a forward pass on both sides, if there was one.
    """

    source: tuple[str, str]
    target: tuple[str, str]
    model: Mapping[str, Any]
    tensors: Mapping[str, TensorReport]
    left_out: tuple[str, ...]
    non_finite: Mapping[str, int]
    notes: tuple[str, ...]
    verified: bool
    forward: str

    def to_json(self) -> dict[str, Any]:
        """The whole report, JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report in a few lines."""
        renamed = [tensor for tensor in self.tensors.values() if tensor.renamed]
        cast = [tensor for tensor in self.tensors.values() if tensor.cast]
        lines = [f"{len(self.tensors)} tensors mapped, {len(renamed)} of them renamed, fused or split"]
        if cast:
            pairs = sorted({f"{dtype} to {tensor.written}" for tensor in cast for dtype in tensor.stored})
            lines.append(f"{len(cast)} tensors cast ({', '.join(pairs)})")
        if self.left_out:
            lines.append(f"{len(self.left_out)} entries of the source left out ({listed(self.left_out)})")
        if self.non_finite:
            total = sum(self.non_finite.values())
            lines.append(f"{total} values that are NaN or infinite kept ({listed(list(self.non_finite))})")
        if self.verified:
            lines.append(f"verified: all {len(self.tensors)} tensors read again on both sides, equal bit for bit")
        if self.forward:
            lines.append(self.forward)
        return [*lines, *(f"note: {note}" for note in self.notes)]


def make_report(
    source: tuple[str, Path],
    target: tuple[str, Path],
    weights: Weights,
    names: Mapping[str, tuple[str, ...]],
    caveats: tuple[str, ...],
    digests: Mapping[str, str],
    forward: str,
) -> ConversionReport:
    """Make the report of a finished conversion.

    Args:
        source: format and path.
        target: format and path.
        weights: the source's.
        names: the target's names by ours.
        caveats: the target format's.
        digests: SHA-256 of every tensor, if both sides were compared.
        forward: result of a forward pass, if there was one.
    """
    return ConversionReport(
        source=(source[0], str(source[1])),
        target=(target[0], str(target[1])),
        model=weights.config.to_json(),
        tensors={
            name: TensorReport(
                source=weights.names[name],
                target=names[name],
                shape=shape,
                stored=tuple(str(dtype).removeprefix("torch.") for dtype in weights.stored_dtypes(name)),
                written=str(weights.dtype(name)).removeprefix("torch."),
                sha256=digests.get(name, ""),
            )
            for name, shape in parameter_shapes(weights.config).items()
        },
        left_out=weights.left_out,
        non_finite=weights.non_finite,
        notes=(*weights.notes, *caveats),
        verified=bool(digests),
        forward=forward,
    )
