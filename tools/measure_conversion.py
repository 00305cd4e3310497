"""Measures memory and time of converting a large model: ``python tools/measure_conversion.py --folder DIR``.

Makes a synthetic checkpoint under Wan's names (random bf16 values of the given size, 1.3b by default: 2.8 GB),
converts it wan -> megatron -> diffusers, and makes as many plain copies of the same bytes. Prints each conversion's
time and peak resident memory above the interpreter and its imports (mapped pages of files count as resident), and the
total against the plain copies. Needs four times the model's bytes of disk, and removes everything it wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COPY_CHUNK = 1 << 24
MEMORY_LIMIT_GB, TIME_LIMIT = 1.5, 2.0


def make_source(folder: Path, model: str) -> Path:
    """Write a sharded folder under Wan's names, one tensor at a time."""
    import dataclasses

    import torch

    from megatron_flashi2v.checkpoint.key_table import mappings
    from megatron_flashi2v.checkpoint.tensor_file import TensorSpec
    from megatron_flashi2v.conversion.weights import TensorGroup, write_hub_folder
    from megatron_flashi2v.models.presets import PRESETS

    config = dataclasses.replace(PRESETS[model], conditioning="text_to_video")
    # Drawn once, since the values do not matter; but a file system might store zeros as holes.
    entries = list(mappings(config, "wan"))
    largest = max(math.prod(entry.external_shape) for entry in entries)
    noise = torch.randn(largest, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups = [
        TensorGroup(
            specs=(TensorSpec(name=name, dtype=torch.bfloat16, shape=entry.external_shape),),
            load=lambda shape=entry.external_shape: (noise[: math.prod(shape)].view(shape),),
        )
        for entry in entries
        for name in entry.external
    ]
    folder.mkdir()
    write_hub_folder(folder, "diffusion_pytorch_model", groups, 5_000_000_000)
    return folder


def plain_copy(source: Path, target: Path) -> float:
    """Copy all files of a folder and flush them to the disk, as a conversion does; returns seconds."""
    start = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        with open(path, "rb") as reader, open(target / path.name, "wb") as writer:
            shutil.copyfileobj(reader, writer, COPY_CHUNK)
            writer.flush()
            os.fsync(writer.fileno())
    return time.perf_counter() - start


CHILD = """
import json, resource, sys, time
from megatron_flashi2v.conversion.convert import convert
from pathlib import Path

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
done = convert((sys.argv[1], Path(sys.argv[2])), (sys.argv[3], Path(sys.argv[4])))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.stdout.write(json.dumps({"bytes": done.bytes, "seconds": seconds, "own_kib": before, "peak_kib": peak}) + "\\n")
"""


def measured(source: tuple[str, Path], target: tuple[str, Path]) -> dict[str, float]:
    """Convert in a new process, and measure it."""
    arguments = [str(part) for part in (*source, *target)]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure and print; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on a disk with enough space")
    parser.add_argument("--model", default="1.3b", help="a preset's name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conversion-") as name:
        folder = Path(name)
        source = make_source(folder / "wan", options.model)
        os.sync()
        # Copies before, between and after, so that other load on the disk affects both.
        copies = [plain_copy(source, folder / "copy")]
        steps = []
        chain = [("wan", source), ("megatron", folder / "megatron"), ("diffusers", folder / "diffusers")]
        for first, second in zip(chain, chain[1:], strict=False):
            steps.append((f"{first[0]} -> {second[0]}", measured(first, second)))
            shutil.rmtree(folder / "copy")
            copies.append(plain_copy(source, folder / "copy"))
        copy_seconds = sum(copies) / len(copies)
        peak = max((step["peak_kib"] - step["own_kib"]) * 1024 for _, step in steps)
        seconds = sum(step["seconds"] for _, step in steps)
        ratio = seconds / (copy_seconds * len(steps))
        lines = [f"{options.model}: {steps[0][1]['bytes'] / 1e9:.2f} GB of tensors"]
        for title, step in steps:
            above = (step["peak_kib"] - step["own_kib"]) * 1024 / 1e9
            lines.append(
                f"{title}: {step['seconds']:.1f} s, {step['bytes'] / 1e6 / step['seconds']:.0f} MB/s, peak memory "
                f"{above:.2f} GB above the interpreter's {step['own_kib'] * 1024 / 1e9:.2f} GB"
            )
        lines += [
            f"plain copy: {copy_seconds:.1f} s each ({', '.join(f'{copy:.1f}' for copy in copies)})",
            f"time against plain copies: {ratio:.2f} (at most {TIME_LIMIT})",
            f"peak memory: {peak / 1e9:.2f} GB (at most {MEMORY_LIMIT_GB})",
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        return int(ratio > TIME_LIMIT or peak > MEMORY_LIMIT_GB * 1e9)


if __name__ == "__main__":
    sys.exit(main())
