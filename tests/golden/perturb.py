"""Shows that the golden tests can fail: changes the goldens one by one, and expects a test to notice each change.

    python tests/golden/perturb.py [FOLDER] [--only PART_OF_A_NAME] [--most COUNT]

A file is first taken away, which must fail tests; these are the ones that read it. Then each of its results, one at a
time, is made 1% larger (3% in bf16): every tensor, and one number of every kind in its JSON, whose texts and truth
values are changed too. What no test notices is listed, and makes the exit code 1. All of it takes an hour on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_flashi2v.training.assembly  # noqa: F401  (loaded once, before the forks)

TESTS = Path(__file__).parent
Leaf = tuple[str | int, ...]
Change = tuple[str, Callable[[Path], Any]]
# What the reference was given; the order of its sampler, which another takes the place of; which of equal bins its sort
# puts first; and a difference that is its rounding.
NOT_COMPARED = re.compile(
    r"data_filter\.json:(entries|configs\.\w+\.kwargs|frame_index_cases\.\d+\.(?!indices)|resize_crop_\w+\.\d+\.[hw]$)"
    r"|dit_and_loss\.json:\w+\.config\."
    r"|dit_\w+\.weights\.safetensors:"
    r"|dit_\w+\.io\.safetensors:(x|t|context|fourier_features|target)$"
    r"|train_\w+\.safetensors:(latents|start_frame_latents|text_embeddings|noise|normal_draws|uniform_draws)$"
    r"|sample_\w+\.safetensors:(initial_noise|start_frame_latents|(negative_)?prompt_embeds)$"
    r"|hf_extractor\.safetensors:.*\.(input|uniforms)$"
    r"|hf_extractor\.json:cases\.\d+\.(name|input|stored|ratio|return_abs|shape|sorted_index)"
    r"|npu_branch\.json:\w+\.max_abs_diff_npu_b1_vs_main$"
    r"|video_transform\.safetensors:\w\.in$"
    r"|sampler_text\.json:(sampler\.|text_cleaning\.\d+\.input$)"
)
NOTHING = 1e-6  # smaller numbers are zero but for rounding
TABLE = 16  # a JSON object of more keys is a table: one of its rows stands for all


class Failures:
    """A pytest plugin that keeps the names of tests that failed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.names:
            self.names.append(report.nodeid)


def run_tests(goldens: Path, tests: list[str], *, first_only: bool) -> list[str]:
    """Names of tests that fail on a folder, run in a fork of this process."""

    def child(connection: Any) -> None:
        with open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
        os.environ["FLASHI2V_GOLDENS"] = str(goldens)
        failures = Failures()
        flags = ["-x"] if first_only else []
        pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parents[1]), *flags, *tests], [failures])
        connection.send(failures.names)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    names = ours.recv()
    process.join()
    return names


def larger(tensor: torch.Tensor) -> torch.Tensor | None:
    """1% more, 3% in bf16; None if that changes nothing."""
    factor = 1.03 if tensor.dtype == torch.bfloat16 else 1.01
    changed = (tensor.double() * factor).to(tensor.dtype)
    return None if torch.equal(changed, tensor) else changed


def changed_value(value: Any) -> Any:
    """Another value of the same type; None if there is none to make."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.01 if NOTHING < abs(value) < math.inf else None
    return value + "x" if isinstance(value, str) else None


def leaves(value: Any, path: Leaf = ()) -> Iterator[tuple[Leaf, Any]]:
    """Every number, text and truth value in a JSON document."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def with_leaf(document: Any, path: Leaf, value: Any) -> Any:
    """A copy of a JSON document with one leaf replaced."""
    document = copy.deepcopy(document)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return document


def kind_of(document: Any, leaf: Leaf) -> str:
    """A leaf's path without positions in lists and rows of tables."""
    parts = []
    for key in leaf:
        is_row = isinstance(document, list) or len(document) > TABLE
        parts.append("*" if is_row else str(key))
        document = document[key]
    return ".".join(parts)


def json_changes(path: Path) -> Iterator[Change]:
    """One leaf of every kind."""
    document = json.loads(path.read_text())
    kinds: dict[str, list[tuple[Leaf, Any]]] = {}
    for leaf, value in leaves(document):
        if changed_value(value) is not None:
            kinds.setdefault(kind_of(document, leaf), []).append((leaf, value))
    numbers = random.Random(0)
    for candidates in kinds.values():
        leaf, value = numbers.choice(candidates)
        text = json.dumps(with_leaf(document, leaf, changed_value(value)))
        yield ".".join(map(str, leaf)), lambda target, text=text: target.write_text(text)


def tensor_changes(path: Path) -> Iterator[Change]:
    """One tensor at a time."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        changed = larger(tensor)
        if changed is not None:
            yield name, lambda target, changed={**tensors, name: changed}: save_file(changed, target)


def result_changes(path: Path, most: int | None) -> list[Change]:
    """Changes of a file's results, at most so many of them."""
    changes = json_changes(path) if path.suffix == ".json" else tensor_changes(path)
    results = [change for change in changes if not NOT_COMPARED.match(f"{path.name}:{change[0]}")]
    return results if most is None or len(results) <= most else random.Random(0).sample(results, most)


def unnoticed_changes(goldens: Path, path: Path, most: int | None) -> list[str]:
    """Changes of one file that no test fails on."""
    with tempfile.TemporaryDirectory() as folder:
        for other in goldens.iterdir():
            if other != path:
                (Path(folder) / other.name).symlink_to(other.resolve())
        readers = run_tests(Path(folder), [str(TESTS)], first_only=False)
        unnoticed = [] if readers else [f"{path.name}: it is read by no test"]
        target = Path(folder) / path.name
        changes = result_changes(path, most) if readers else []
        for name, write in changes:
            write(target)
            if not run_tests(Path(folder), readers, first_only=True):
                unnoticed.append(f"{path.name}: {name}")
        print(f"{path.name}: {len(readers)} tests read it; {len(changes)} changes, {len(unnoticed)} unnoticed")
        print(*(f"  {line}\n" for line in unnoticed), sep="", end="", flush=True)
        return unnoticed


def main() -> int:
    """Try all files; 1 if a change went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = os.environ.get("FLASHI2V_GOLDENS", TESTS.parents[2] / "shared" / "goldens")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(usual))
    parser.add_argument("--only", default="", help="files with this in their name")
    parser.add_argument("--most", type=int, help="changes of one file, drawn at random; by default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if run_tests(arguments.folder, [str(TESTS)], first_only=False):
        print(f"the tests fail on {arguments.folder} as it is")
        return 1
    files = sorted(path for path in arguments.folder.iterdir() if path.suffix in (".json", ".safetensors"))
    unnoticed = [
        unnoticed_changes(arguments.folder, path, arguments.most) for path in files if arguments.only in path.name
    ]
    return int(any(unnoticed))


if __name__ == "__main__":
    sys.exit(main())
