"""Reads the pickled description of a foreign file without importing or running anything that it names.

torch's own files (``.pt``, ``.pth``, and the ``.metadata`` of its distributed checkpoints) describe their tensors in a
pickle, which in general is a program. This reader accepts only names on a list, and turns even those into inert
:class:`Record` objects that store their arguments: no function of torch ever sees an argument from the file (several
releases of torch's ``weights_only`` loader could be made to run code or to write out of bounds). It refuses any other
name, but for those of packages that a caller lists: a trainer's own classes, which are inert records like the rest.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from megatron_flashi2v.config.errors import CheckpointError

Name = tuple[str, str]
"""Module and name of a class or function."""

MAX_BYTES = 64 * 1024**2
"""A description of ten thousand tensors takes about a megabyte; a much larger one describes something else."""


class Record:
    """Stands for an object: the arguments of its constructor, and its state."""

    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any) -> Record:
        """Keep the arguments; a pickle makes every object through this."""
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def name(self) -> str:
        """Name of the class or function that this stands for."""
        return type(self).__name__

    def field(self, name: str) -> Any:
        """One attribute of a pickled dataclass; None if the file does not store it."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Table(dict[Any, Any]):
    """Stands for an ordered dictionary, without the attributes that ``state_dict()`` adds to it."""

    def __setstate__(self, state: Any) -> None:
        """Drop the attributes."""


class _Refused(Exception):
    """A name that is not on the list."""


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, allowed: Collection[Name], packages: Collection[str],
        persistent: Callable[[Any], Any] | None,
    ) -> None:  # fmt: skip
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._packages = packages
        # New classes for every file: a pickle can set attributes of what it gets.
        self._known: dict[Name, type] = {name: type(name[1], (Record,), {}) for name in allowed}
        self._known["collections", "OrderedDict"] = type("OrderedDict", (Table,), {})
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a listed name."""
        if (module, name) not in self._known:
            if module.partition(".")[0] not in self._packages:
                raise _Refused(f"{module}.{name}")
            self._known[module, name] = type(name.rpartition(".")[2], (Record,), {})
        return self._known[module, name]

    def persistent_load(self, identifier: Any) -> Any:
        """Resolve a reference to one of the file's storages."""
        if self._persistent is None:
            raise _Refused("a persistent identifier")
        return self._persistent(identifier)


def load_restricted(
    data: bytes,
    allowed: Collection[Name],
    *,
    source: Path,
    packages: Collection[str] = (),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Load a pickle as plain Python values, with a :class:`Record` for each object.

    Args:
        data: the pickle.
        allowed: the only names that it may contain, besides ``OrderedDict``.
        source: the file, for errors.
        packages: top-level packages whose every name may stand in it, as a record.
        persistent: resolves persistent identifiers; without it the pickle must have none.

    Raises:
        CheckpointError: the pickle needs another name, or is damaged. Nothing of it has run.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{source}: its description has {len(data):,} bytes; the limit is {MAX_BYTES:,}")
    try:
        return _RestrictedUnpickler(data, allowed, packages, persistent).load()
    except _Refused as error:
        raise CheckpointError(
            f"{source} is refused: its pickle needs {error}, and only tensors in dictionaries can be read (nothing of "
            "it has run); if you trust the file, save its tensors anew, best as safetensors"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler fed with noise may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source}: its pickled description is damaged ({reason})") from error
