"""``i3d:FILE``: the 400 logits of an Inflated 3D network trained on Kinetics-400, from a TorchScript file.

T. Unterthiner et al., arXiv 1812.01717, take these logits of J. Carreira and A. Zisserman's network (arXiv 1705.07750)
as features of the Frechet Video Distance. The file is a program: it runs in a process of its own, which gets pixels and
answers with logits, and knows nothing of this one's environment but what torch needs.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.evaluation.chunks import Chunks
from megatron_flashi2v.evaluation.features.base import VideoFeatures, file_sha256, require_min_frames, resized
from megatron_flashi2v.evaluation.videos import VideoShape

SIDE = 224
LOGITS = 400
LEAST_FRAMES = 10
LIMIT_S = 900.0
"""Seconds that one batch, or loading, may take."""
_PACKAGE_ROOT = Path(inspect.getfile(VideoFeatures)).parents[3]
_KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH",
         "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH", "TMPDIR")  # fmt: skip
"""Variables of the environment that the process gets; tokens and keys are not among them."""


class I3DFeatures(VideoFeatures):
    """The file's program, in its process.

    Args:
        path: TorchScript; ``forward`` takes fp32 ``[B, 3, T, 224, 224]`` in [-1, 1] and returns ``[B, 400]``. Flags
            called ``rescale``, ``resize`` and ``return_features`` are set to False, False and True.
        device: where it runs, such as "cpu" or "cuda:0".

    Raises:
        ConfigError: the file cannot be read, is no TorchScript, or has another signature.
    """

    measure = "Fréchet video distance (I3D logits)"
    width = LOGITS
    still_frames = LEAST_FRAMES
    batch = 4

    def __init__(self, path: Path, device: str) -> None:
        if not path.is_file():
            raise ConfigError(f"--features i3d:{path}: there is no such file")
        self._path, self._sha256 = path, file_sha256(path)
        self._process = self._start(device)
        try:
            self._answer()  # that the program is loaded
            self._check_signature()
        except BaseException:
            self.close()
            raise

    def settings(self) -> dict[str, Any]:
        return {"features": "i3d", "width": LOGITS, "sha256": {"file": self._sha256}, "pixels": [SIDE, SIDE],
                "resize": "bilinear", "range": [-1, 1]}  # fmt: skip

    def check(self, chunks: Chunks, shape: VideoShape) -> None:
        require_min_frames(chunks, LEAST_FRAMES, "i3d")

    def embed(self, clips_BTHWC: torch.Tensor) -> torch.Tensor:
        clips_BTCHW = resized(clips_BTHWC.cpu(), SIDE, SIDE, antialias=False) / 127.5 - 1
        return self._ask(clips_BTCHW.transpose(1, 2).contiguous())

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _start(self, device: str) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        paths = [str(_PACKAGE_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_flashi2v.evaluation.features.i3d_process", str(self._path), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )

    def _check_signature(self) -> None:
        logits = self._ask(torch.zeros(1, 3, LEAST_FRAMES, SIDE, SIDE))
        if tuple(logits.shape) != (1, LOGITS):
            raise ConfigError(
                f"--features i3d:{self._path}: a clip gives {list(logits.shape[1:])} features; it must be {LOGITS}, "
                "the logits of Kinetics-400"
            )

    def _ask(self, clips_BCTHW: torch.Tensor) -> torch.Tensor:
        """Logits of clips."""
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps(list(clips_BCTHW.shape)).encode() + b"\n")
            stream.write(clips_BCTHW.numpy().data)
            stream.flush()
        except BrokenPipeError as error:
            raise self._refused("its process ended") from error
        shape, data = self._answer()
        logits = torch.frombuffer(data, dtype=torch.float32).view(shape)
        if not bool(torch.isfinite(logits).all()):
            raise DataError(f"--features i3d:{self._path}: gives logits that are not finite; the file is damaged")
        return logits

    def _answer(self) -> tuple[list[int], bytearray]:
        """The next answer's shape and bytes; the process is ended when it takes too long."""
        stream = self._process.stdout
        assert stream is not None
        timer = threading.Timer(LIMIT_S, self._process.kill)
        timer.start()
        try:
            line = stream.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
            if "error" in answer:
                raise self._refused(answer["error"])
            size = 4 * math.prod(answer["shape"])
            data = bytearray(stream.read(size))
        finally:
            timer.cancel()
        if len(data) < size:
            raise self._refused("its process ended")
        return answer["shape"], data

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"--features i3d:{self._path}: {why}; it must be a TorchScript file whose forward takes [B, 3, T, {SIDE}, "
            f"{SIDE}] and returns [B, {LOGITS}]"
        )
