"""Folders that other trainers write: which iteration is the newest, and which file in it holds the weights.

FlashI2V's main branch writes ``iter_*/model_state_dict.pt`` and, for the averaged weights, ``ema_model_state_dict.pt``.
Megatron and its forks write ``iter_*/mp_rank_00/model_optim_rng.pt``, or ``release/`` in place of an iteration, with
the newest iteration's number in a file above; MindSpeed writes the averaged weights beside, as ``*.ema``.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_flashi2v.config.errors import CheckpointError

EMA = "ema"

_ITERATION = re.compile(r"iter_(\d+)")
_RANK = re.compile(r"mp_rank_\d+(_\d+)*")
_TRACKER, _RELEASE = "latest_checkpointed_iteration.txt", "release"
_MODEL_FILE, _EMA_FILE = "model_state_dict.pt", "ema_model_state_dict.pt"
_RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")


def newest_iteration(folder: Path) -> Path:
    """The newest iteration's folder under a trainer's; any other folder itself.

    Takes the one that the tracker names, then the highest number.

    Raises:
        CheckpointError: the tracker names a folder that is not there.
    """
    numbers = {int(match[1]): child for child in folder.iterdir()
               if child.is_dir() and (match := _ITERATION.fullmatch(child.name))}  # fmt: skip
    tracker = folder / _TRACKER
    named = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else ""
    if named == _RELEASE:
        if (folder / _RELEASE).is_dir():
            return folder / _RELEASE
        raise CheckpointError(f"{tracker} names {_RELEASE}, which is missing; name the folder to read")
    if not numbers:
        return folder
    if named.isdecimal() and int(named) not in numbers:
        held = ", ".join(child.name for _, child in sorted(numbers.items())[-5:])
        raise CheckpointError(f"{tracker} names iteration {int(named)}, which is missing; name one of {held}")
    return numbers[int(named) if named.isdecimal() else max(numbers)]


def find_training_file(folder: Path, weights: str) -> Path | None:
    """The file of an iteration's folder that holds a set of weights; None in folders of another kind.

    Args:
        folder: an iteration's, or a rank's in it.
        weights: ``model`` or ``ema``.

    Raises:
        CheckpointError: the weights are divided over ranks.
    """
    pair = folder / (_EMA_FILE if weights == EMA else _MODEL_FILE)
    if pair.is_file():
        return pair
    ranks = sorted(child for child in folder.iterdir() if child.is_dir() and _RANK.fullmatch(child.name))
    if len(ranks) > 1:
        raise CheckpointError(
            f"{folder} is divided over {len(ranks)} model-parallel ranks ({ranks[0].name} to {ranks[-1].name}); only "
            "an undivided one can be read: save it again with tensor and pipeline parallel size 1"
        )
    inside = ranks[0] if ranks else folder
    files = [inside / name for name in _RANK_FILES if (inside / name).is_file()]
    if not files:
        return None
    average = files[0].with_name(f"{files[0].name}.{EMA}")
    return average if weights == EMA and average.is_file() else files[0]
