"""Text from outside, made fit to be written: encodable as UTF-8, and without the secrets of signed addresses."""

from __future__ import annotations

import logging
import re

REPLACEMENT = "\ufffd"

_SURROGATE = re.compile("[\ud800-\udfff]")
# A path object turns the two slashes of an address into one.
_QUERY = re.compile(
    r"""\b([a-z][a-z0-9+.-]+:/+[^\s?"'<>]*)\?[^\s"'<>]*?(?=[:;,.)\]]*(?:[\s"'<>]|$))""", re.IGNORECASE
)
_USER = re.compile(r"""\b([a-z][a-z0-9+.-]+:/+)[^\s/?"'<>]*@""", re.IGNORECASE)
_PARAMETER = re.compile(
    r"""([?&][^\s=&"']*(?:signature|sig|token|credential|key|secret|password|policy)[^\s=&"']*=)[^\s&"'<>]+""",
    re.IGNORECASE,
)


def encodable(text: str) -> str:
    """The text with U+FFFD in place of lone surrogates, which UTF-8 has no bytes for.

    They come from escapes in JSON, and from file names that are not UTF-8 (``os.fsdecode``).
    """
    return _SURROGATE.sub(REPLACEMENT, text)


def to_utf8(text: str) -> bytes:
    """The bytes of :func:`encodable` text: what everything that this project writes goes through."""
    return encodable(text).encode("utf-8")


def without_secrets(text: str) -> str:
    """The text without users, passwords and queries of addresses, and without parameters that carry keys.

    A signed address (``https://...?X-Amz-Signature=...``) is a key to what it names; ``?...`` stands for its query.
    """
    text = _USER.sub(r"\1", _QUERY.sub(r"\1?...", text))
    return _PARAMETER.sub(r"\1...", text)


def shown(text: str) -> str:
    """The text as it may stand in a log, a list or a report: encodable and without secrets."""
    return without_secrets(encodable(text))


def excerpt(text: str, length: int = 80) -> str:
    """The beginning of :func:`shown` text, for a message.

    To cut first would leave the rest of a key, without what tells that it is one.
    """
    text = shown(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


class ShownFormatter(logging.Formatter):
    """Formats lines of the log as :func:`shown` text."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with a traceback if there is one."""
        return shown(super().format(record))
