"""Hides other libraries' warnings about which a user can do nothing. Imports nothing heavy, to precede them."""

from __future__ import annotations

import os
import warnings


def hide_unhelpful_warnings() -> None:
    """Hide megatron-core's advice to install Apex, its use of deprecated collectives, and transformers' loading bars.

    Call it before importing any of these, within ``warnings.catch_warnings()`` where the filters are to be undone.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core(\.|$)")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger$")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
