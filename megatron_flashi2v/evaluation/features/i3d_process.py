"""The process in which a TorchScript file's program runs.

``python -m megatron_flashi2v.evaluation.features.i3d_process FILE DEVICE`` writes a line of JSON, an empty shape, when
the program is loaded. Then it reads requests on standard input: a line of JSON, the shape of a batch of clips, and its
fp32 values. It answers each with a line of JSON, the shape of the result or what is wrong, and its fp32 values. It ends
with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

FLAGS = {"rescale": False, "resize": False, "return_features": True}
"""Arguments of the usual files: pixels come ready, and logits are wanted instead of probabilities."""


def load(path: str, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file's program as a function of clips.

    Raises:
        ValueError: ``forward`` has arguments that are neither known nor have a default.
        RuntimeError: the file is no TorchScript.
    """
    network = torch.jit.load(path, map_location=device).eval()
    arguments = network.forward.schema.arguments[2:]  # after self and the clips
    unknown = [one.name for one in arguments if one.name not in FLAGS and not one.has_default_value()]
    if unknown:
        raise ValueError(f"forward wants {', '.join(unknown)}")
    flags = {one.name: FLAGS[one.name] for one in arguments if one.name in FLAGS}
    return lambda clips_BCTHW: network(clips_BCTHW, **flags)


@torch.no_grad()
def serve(program: Callable[[torch.Tensor], Any], device: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    while line := requests.readline():
        shape = json.loads(line)
        values = bytearray(requests.read(4 * torch.Size(shape).numel()))
        clips_BCTHW = torch.frombuffer(values, dtype=torch.float32).view(shape).to(device)
        try:
            result = program(clips_BCTHW)
            if not isinstance(result, torch.Tensor) or result.ndim != 2:
                raise ValueError(f"forward returns {_described(result)}")
        except Exception as error:  # print whatever a foreign program raises in one line
            answer(answers, {"error": _gist(error)})
            continue
        answer(answers, {"shape": list(result.shape)})
        answers.write(result.float().cpu().contiguous().numpy().tobytes())
        answers.flush()


def answer(answers: BinaryIO, value: dict[str, Any]) -> None:
    """Write one line."""
    answers.write(json.dumps(value).encode() + b"\n")
    answers.flush()


def _described(result: Any) -> str:
    return f"a tensor of shape {list(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__


def _gist(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


def main() -> None:
    """Serve standard input; what the program prints goes to standard error."""
    path, device = sys.argv[1:3]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        program = load(path, device)
    except Exception as error:
        answer(answers, {"error": f"cannot be loaded ({_gist(error)})"})
        return
    answer(answers, {"shape": [0]})
    serve(program, device, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
