"""Reading the pickled description of a foreign file without letting it name, import or run anything.

torch's own files (``.pt``, ``.pth``, and the ``.metadata`` of its distributed checkpoints) describe their tensors in a
pickle, which in general is a program. Here only names on a list are known, and even those become inert
:class:`Record` objects that remember what they were given: no function of torch ever sees an argument from the file
(several releases of torch's ``weights_only`` loader could be made to run code or to write out of bounds). Whatever
needs another name is refused.
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
"""A description of ten thousand tensors takes about a megabyte; more is not what it says."""


class Record:
    """What stands for an object: the arguments that it would have been made with, and its state."""

    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any) -> Record:
        """Keep the arguments; called by every way that a pickle has of making an object."""
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def name(self) -> str:
        """Name of the class or function that it stands for."""
        return type(self).__name__

    def field(self, name: str) -> Any:
        """One attribute of a pickled dataclass; None where it was not stored."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Table(dict[Any, Any]):
    """What stands for an ordered dictionary; the attributes that ``state_dict()`` adds to it are dropped."""

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


class _Refused(Exception):
    """A name that is not on the list."""


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Collection[Name], persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        # Made anew for every file: a pickle can set attributes of what it is given.
        self._known: dict[Name, type] = {name: type(name[1], (Record,), {}) for name in allowed}
        self._known["collections", "OrderedDict"] = type("OrderedDict", (Table,), {})
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in of a listed name."""
        if (module, name) not in self._known:
            raise _Refused(f"{module}.{name}")
        return self._known[module, name]

    def persistent_load(self, identifier: Any) -> Any:
        """What the file's storages are referred to by."""
        if self._persistent is None:
            raise _Refused("a persistent identifier")
        return self._persistent(identifier)


def load_restricted(
    data: bytes, allowed: Collection[Name], *, source: Path, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The plain Python values of a pickle, with :class:`Record` for objects.

    Args:
        data: the pickle.
        allowed: the only names that it may contain, besides ``OrderedDict``.
        source: file that it came from, for errors.
        persistent: resolves persistent identifiers; without it they are refused.

    Raises:
        CheckpointError: the pickle needs another name, or is damaged. Nothing of it has been run.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{source}: its description has {len(data):,} bytes, at most {MAX_BYTES:,} are read")
    try:
        return _RestrictedUnpickler(data, allowed, persistent).load()
    except _Refused as error:
        raise CheckpointError(
            f"{source} is refused: its pickle needs {error}, and only tensors in dictionaries are read (nothing of it "
            "was run); if you trust the file, save its tensors anew, best as safetensors"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler fed with noise may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source}: its pickled description is damaged ({reason})") from error
