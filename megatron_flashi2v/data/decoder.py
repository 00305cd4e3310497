"""Clips in order, decoded ahead by processes of their own: a crash or a hang costs one clip and a restart."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_flashi2v.config.clips import ClipSettings
from megatron_flashi2v.config.errors import DataError
from megatron_flashi2v.data.annotations import Entry
from megatron_flashi2v.data.clips import Frames, load_frames
from megatron_flashi2v.data.decoder_process import encode_request, frames_from_json, settings_to_json
from megatron_flashi2v.data.reasons import Drop

START_LIMIT_S = 600.0
"""How long a process may take to start; imports are slow on a busy file system."""
_CHUNK = 2**20


class Decoder:
    """Decodes annotations' clips, each once, in order.

    Args:
        settings: what decides a sample's pixels.
        seed: of the draws while preparing.
        workers: processes that decode ahead; 0 decodes in this process, where nothing contains a crash or a hang.
        limit_s: seconds that one clip may take.
    """

    def __init__(self, settings: ClipSettings, seed: int, *, workers: int, limit_s: float) -> None:
        self._settings, self._seed = settings, seed
        self._processes = [DecoderProcess(settings, seed, limit_s) for _ in range(workers)]

    def decode(self, entries: Sequence[Entry]) -> Generator[Frames | Drop, None, None]:
        """Yield each annotation's frames, or the reason why there are none."""
        if not self._processes:
            for entry in entries:
                yield load_frames(entry, self._settings, self._seed)
            return
        count = len(self._processes)
        try:
            for process, entry in zip(self._processes, entries, strict=False):
                process.submit(entry)
            for number in range(len(entries)):
                process = self._processes[number % count]
                found = process.result()
                if number + count < len(entries):
                    process.submit(entries[number + count])
                yield found
        finally:
            for process in self._processes:
                process.forget()

    def close(self) -> None:
        """End the processes; decoding again starts new ones."""
        for process in self._processes:
            process.stop()


class DecoderProcess:
    """One process with at most one clip in work; started when first needed, and again after it was lost."""

    def __init__(self, settings: ClipSettings, seed: int, limit_s: float) -> None:
        self._settings, self._seed, self._limit_s = settings, seed, limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._entry: Entry | None = None
        self._deadline = 0.0
        self._received = bytearray()

    def submit(self, entry: Entry) -> None:
        """Begin to decode; :meth:`result` must be taken before the next one."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(encode_request(asdict(entry)))
            process.stdin.flush()
        except BrokenPipeError:  # it ended while it was idle
            self.stop()
            process = self._running()
            assert process.stdin is not None
            process.stdin.write(encode_request(asdict(entry)))
            process.stdin.flush()
        self._entry, self._deadline = entry, time.monotonic() + self._limit_s

    def result(self) -> Frames | Drop:
        """Return the clip's frames, or the reason why there are none."""
        entry = self._entry
        assert entry is not None
        try:
            answer = json.loads(self._read_line())
            self._deadline = time.monotonic() + self._limit_s  # decoded; the bytes are still to come
            size = 1
            for side in answer.get("shape", [0]):
                size *= side
            found = frames_from_json(answer, self._read(size))
        except TimeoutError:
            self.stop()
            found = Drop("decoder_hang", f"{entry.file}: decoding took more than {self._limit_s:g} s")
        except EOFError:
            found = Drop("decoder_crash", f"{entry.file}: the decoder crashed ({self._end()})")
        self._entry = None
        return found

    def forget(self) -> None:
        """Give up the clip in work, if there is one."""
        if self._entry is not None:
            self.stop()

    def stop(self) -> None:
        """End the process at once."""
        self._entry = None
        self._received.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # bytes that a lost process has not taken
                        pipe.close()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_flashi2v.data.decoder_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin is not None
        self._deadline = time.monotonic() + START_LIMIT_S
        try:
            self._process.stdin.write(encode_request(settings_to_json(self._settings, self._seed, self._limit_s)))
            self._process.stdin.flush()
            self._read_line()
        except (EOFError, TimeoutError, BrokenPipeError) as error:
            raise DataError(
                f"the decoder's process did not start ({self._end()}); --decode-workers 0 decodes without one"
            ) from error
        return self._process

    def _end(self) -> str:
        """Stop the process; return how it ended."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        if code is None:
            return "it closed its output"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _read_line(self) -> bytes:
        while b"\n" not in self._received:
            self._receive()
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        return line

    def _read(self, size: int) -> bytearray:
        while len(self._received) < size:
            self._receive()
        data, self._received = self._received[:size], self._received[size:]
        return data

    def _receive(self) -> None:
        """Append the bytes that have arrived.

        Raises:
            TimeoutError: nothing came before the deadline.
            EOFError: nothing more will come.
        """
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        # What is there already is in time, however late it is taken.
        if not waiting.poll(1000 * max(0.0, self._deadline - time.monotonic())):
            raise TimeoutError
        data = os.read(descriptor, _CHUNK)
        if not data:
            raise EOFError
        self._received += data
