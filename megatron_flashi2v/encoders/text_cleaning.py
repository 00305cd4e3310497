"""Cleaning of captions before tokenising.

The released FlashI2V models were trained on heavily cleaned, lower-case captions ("full": ``clean_caption`` in
FlashI2V's ``flashi2v/data/utils/utils.py``, branch main), while prompts at inference only got the mild cleaning that
Wan's pipelines use ("light"). Prompt a model with the policy that it was trained with.
"""

from __future__ import annotations

import html
import logging
import re
import urllib.parse
from collections.abc import Sequence
from typing import Literal

import bs4
import bs4.builder
import ftfy

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.runtime.text import excerpt

CleaningPolicy = Literal["full", "light"]
POLICIES: tuple[CleaningPolicy, ...] = ("full", "light")

logger = logging.getLogger(__name__)

Rule = tuple[re.Pattern[str], str]


def clean_text(text: str, policy: CleaningPolicy) -> str:
    """Clean one caption or prompt.

    Args:
        text: as written.
        policy: "full" applies the training captions' cleaning twice (the second pass sees what the first one
            uncovered, and the reference trained on that); "light" repairs the encoding, resolves HTML entities and
            collapses white space.

    Returns:
        The cleaned text; it may be empty.

    Raises:
        ValueError: another policy.
    """
    if policy == "full":
        return _clean_once(_clean_once(text))
    if policy == "light":
        repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
        return re.sub(r"\s+", " ", repaired.strip()).strip()
    raise ValueError(f"cleaning policy {policy!r}; choose one of {', '.join(POLICIES)}")


def lost_most(text: str, cleaned: str) -> bool:
    """Whether cleaning took more than half of a text's letters (of any script), as "full" does with Chinese."""
    return 2 * sum(map(str.isalpha, cleaned)) < sum(map(str.isalpha, text))


def clean_prompt(prompt: str, policy: CleaningPolicy, what: str = "prompt") -> str:
    """:func:`clean_text` of a prompt that says something afterwards too.

    Args:
        prompt: as written; an empty one stays empty.
        policy: see :func:`clean_text`.
        what: it is, for the messages.

    Raises:
        ConfigError: see :func:`require_words`.
    """
    cleaned = require_words(prompt, policy, what)
    if lost_most(prompt, cleaned):
        logger.warning(
            "of the %s %r, text cleaning %s leaves %r", what, prompt[:80], policy, cleaned[:80], extra=AGREED
        )
    return cleaned


def require_words(prompt: str, policy: CleaningPolicy, what: str = "prompt") -> str:
    """Refuse a prompt that cleaning empties; returns the cleaned one.

    Raises:
        ConfigError: no letter and no digit is left of it. The model would see the same of every such prompt.
    """
    cleaned = clean_text(prompt, policy)
    said = any(map(str.isalnum, prompt))
    if (said and not any(map(str.isalnum, cleaned))) or (prompt.strip() and not cleaned):
        raise ConfigError(
            f"the {what} {excerpt(prompt)!r} is empty after text cleaning {policy}, with which the model was trained: "
            f"{excerpt(cleaned)!r} is left; word it in a script that the model knows, such as English"
        )
    return cleaned


def _rules(*rules: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


def _address(scheme: str) -> str:
    """A scheme with its slashes, or a host under one of the common domains with the path behind it."""
    host = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{host})"


_FILE_ENDINGS = r"(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_JUNK = re.escape("#®•©™&@·º½¾¿¡§~()[]{}|\\/*")

_ADDRESSES = _rules(("<person>", "person"), (_address("https?"), ""), (_address("www"), ""))

_BEFORE_REPAIR = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes to unified ideographs, seven adjoining blocks
    (rf"[{_DASHES}]+", "-"),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&(?:quot;?|amp)", ""),
    (r"(?:\d{1,3}\.){3}\d{1,3}", " "),  # IPv4 addresses
    (r"\d:\d\d\s+$", ""),  # numbers of articles
    (r"\\n", " "),  # a backslash and an n
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_FILE_ENDINGS}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (rf"[{_JUNK}]+", " "),
    (r"\s+\.\s+", " "),
)

_AFTER_REPAIR = _rules(
    # Article codes: jc6640, jc6640vc, 6640vc231.
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    # Phrases of shops and stock sites.
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_ENDINGS}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    # Longer codes, j2d1a2a, and sizes, 1920x1080 (Latin x, Cyrillic kha, multiplication sign).
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    # White space around punctuation.
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    # Quotes around the whole, then stray punctuation at the ends; the text is not stripped before, as trained.
    (r"^[\"']([\s\S]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _clean_once(text: str) -> str:
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _apply(_ADDRESSES, text)
    text = _without_tags(text)
    text = _apply(_BEFORE_REPAIR, text)
    if sum(text.count(joiner) for joiner in "-_") > 3:  # this-is-a-file-name
        text = text.replace("-", " ").replace("_", " ")
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_AFTER_REPAIR, text).strip()


def _without_tags(text: str) -> str:
    if "<" not in text and "&" not in text:
        return text
    try:
        return bs4.BeautifulSoup(text, "html.parser").text
    except (bs4.builder.ParserRejectedMarkup, AssertionError):
        return text  # such as "<![", which opens a declaration that the parser does not know


def _apply(rules: Sequence[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
