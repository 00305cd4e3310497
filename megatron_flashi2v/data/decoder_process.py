"""The process in which files are decoded, so that a decoder that crashes or hangs takes nothing else with it.

``python -m megatron_flashi2v.data.decoder_process`` reads lines of JSON on standard input: first the settings, then one
annotation each. It answers each with a line of JSON on standard output: why the clip is dropped, or the shape of its
frames, followed by their bytes. It ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

import torch

from megatron_flashi2v.config.clips import ClipSettings, FilterSettings
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.clips import Frames, load_frames
from megatron_flashi2v.data.reasons import Drop
from megatron_flashi2v.data.video import VideoFacts

GRACE_S = 10
"""How much later than its parent's limit a process ends itself, whose parent is gone."""


def encode_request(value: Any) -> bytes:
    """A line: of :class:`ClipSettings`, the seed and the time limit, or of an annotation."""
    return json.dumps(value).encode() + b"\n"


def settings_to_json(settings: ClipSettings, seed: int, limit_s: float) -> dict[str, Any]:
    """The first line's contents."""
    return {"clips": asdict(settings), "seed": seed, "limit_s": limit_s}


def entry_from_json(values: dict[str, Any]) -> Entry:
    """The reverse of ``dataclasses.asdict``."""
    tuples = {name: tuple(values[name]) for name in ("captions", "cut", "crop") if values[name] is not None}
    return Entry(**{**values, **tuples})


def frames_to_json(found: Frames | Drop) -> dict[str, Any]:
    """The answer's line."""
    if isinstance(found, Drop):
        return {"drop": asdict(found)}
    return {
        "shape": list(found.frames_TCHW.shape),
        "indices": list(found.indices),
        "facts": asdict(found.facts),
    }


def frames_from_json(values: dict[str, Any], pixels: bytearray) -> Frames | Drop:
    """The reverse of :func:`frames_to_json`; ``pixels`` are the bytes that followed."""
    if "drop" in values:
        return Drop(**values["drop"])
    return Frames(
        frames_TCHW=torch.frombuffer(pixels, dtype=torch.uint8).view(values["shape"]),
        indices=tuple(values["indices"]),
        facts=VideoFacts(**values["facts"]),
    )


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    first = json.loads(requests.readline())
    settings = ClipSettings(**{**first["clips"], "wanted": FilterSettings(**first["clips"]["wanted"])})
    answers.write(b"ready\n")
    answers.flush()
    for line in requests:
        # The default action ends the process from the kernel, whatever the decoder is doing.
        signal.setitimer(signal.ITIMER_REAL, first["limit_s"] + GRACE_S)
        found = load_frames(entry_from_json(json.loads(line)), settings, first["seed"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(encode_request(frames_to_json(found)))
        if isinstance(found, Frames):
            answers.write(found.frames_TCHW.contiguous().numpy().data)
        answers.flush()


def main() -> None:
    """Serve standard input; what libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, answers)
    except BrokenPipeError:
        os._exit(0)  # the parent is gone


if __name__ == "__main__":
    main()
