"""``flashi2v prepare`` killed (SIGKILL) at random moments and started again: nothing lost, doubled or left behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from helpers.tiny_corpus import make_corpus

from megatron_flashi2v.data.prepared import PreparedDataset

CLIPS, KILLS = 20, 3


def decoders_of(output: Path) -> list[int]:
    """Decoder processes that work for a data set: they inherit a variable that names it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST_OUTPUT={output}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that tell seconds."""
    told = [folder / "summary.json", *folder.glob("shards/*.json")]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in told
    }


def start(flags: list[str], output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_flashi2v", "prepare", *flags, "--output", str(output)]
    environment = {**os.environ, "TEST_OUTPUT": str(output)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_again_and_again(tmp_path: Path) -> None:
    flags = [*make_corpus(tmp_path / "corpus", CLIPS, z_dim=4, text_dim=16), "--samples-per-shard", "1"]
    flags += ["--decode-workers", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert start(flags, whole).wait(timeout=400) == 0
    seconds = time.monotonic() - began
    dice, finished = random.Random(5), 0
    for _ in range(KILLS):
        process = start(flags, killed)
        # Half of the kills fall somewhere in the run, half shortly after a new shard.
        if dice.random() < 0.5:
            time.sleep(dice.uniform(0.3, 1.0) * seconds)
        else:
            limit = time.monotonic() + 2 * seconds + 60
            while len(list((killed / "shards").glob("*.json"))) <= finished and time.monotonic() < limit:
                if process.poll() is not None:
                    break
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 0.3))
        process.kill()
        process.wait()
        finished = len(list((killed / "shards").glob("*.json")))
    limit = time.monotonic() + 60
    while decoders_of(killed) and time.monotonic() < limit:
        time.sleep(0.2)
    assert not decoders_of(killed)
    assert start(flags, killed).wait(timeout=400) == 0
    assert contents(killed) == contents(whole)
    data = PreparedDataset(killed)
    assert len({data[index].key for index in range(len(data))}) == len(data) == CLIPS
