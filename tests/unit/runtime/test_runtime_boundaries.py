"""What only certain files may say: an accelerator's package, its namespace in torch, its name."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("megatron_flashi2v", "kernels", "examples", "tools")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
VENDOR_PACKAGES = {"torch_npu", "mindspeed"}
RUNTIME, KERNELS = ROOT / "megatron_flashi2v" / "runtime", ROOT / "kernels"
CONFIG = ROOT / "megatron_flashi2v" / "config"
CARD_CHECK = set((ROOT / "tools").glob("check_gpu*.py"))
"""CUDA is what it checks."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports, by statement or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value.partition(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant))


def namespaces(tree: ast.AST) -> Iterator[str]:
    """``torch.cuda`` and ``torch.npu``, however they are reached, and ``.cuda()`` and ``.npu()`` of tensors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "npu"):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch.cuda", "torch.npu")):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith(("torch.cuda", "torch.npu")))


def device_names(tree: ast.AST) -> Iterator[str]:
    """Strings that name an accelerator, alone or with its number."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name, _, index = node.value.partition(":")
            if name in ("cuda", "npu") and (index.isdecimal() or not index):
                yield node.value


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_folder_is_looked_at() -> None:
    """All Python that the repository keeps, but for its tests and its set-up."""
    done = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is no checkout")
    assert {path.partition("/")[0] for path in done.stdout.splitlines()} == {*FOLDERS, "tests", "setup.py"}


def test_vendor_packages_are_imported_in_runtime_and_npu_kernels_alone() -> None:
    users = {path for path in FILES if VENDOR_PACKAGES & set(imported(parsed(path)))}
    strangers = [p for p in users if RUNTIME not in p.parents and not (KERNELS in p.parents and p.name == "npu.py")]
    assert not strangers
    assert any(RUNTIME in path.parents for path in users) and any(path.name == "npu.py" for path in users)


def test_torchs_accelerator_namespaces_are_used_in_runtime_and_the_registry_alone() -> None:
    allowed = {KERNELS / "flashi2v_kernels" / "registry.py", *CARD_CHECK}
    users = {path: set(namespaces(parsed(path))) for path in FILES if RUNTIME not in path.parents}
    assert {path: found for path, found in users.items() if found and path not in allowed} == {}


def test_no_device_is_named_outside_runtime_kernels_and_the_choice_of_flags() -> None:
    users = {path: set(device_names(parsed(path))) for path in FILES
             if path not in CARD_CHECK and not {RUNTIME, KERNELS, CONFIG} & set(path.parents)}
    assert {path: found for path, found in users.items() if found} == {}


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (imported, "import torch_npu"), (imported, "from mindspeed.core import x"),
        (imported, "import os, torch_npu.x"),
        (imported, "importlib.import_module('mindspeed.megatron_adaptor')"),
        (namespaces, "torch.cuda.synchronize()"), (namespaces, "import torch.cuda as c"), (namespaces, "x = y.npu()"),
        (namespaces, "from torch.cuda import Stream"),
        (device_names, "torch.ones(1, device='cuda')"), (device_names, "x.to('npu:0')"),
    ],
)
def test_the_checks_find(check, source) -> None:
    found = set(check(ast.parse(source)))
    assert found & {*VENDOR_PACKAGES, "torch.cuda", "y.npu", "cuda", "npu:0"}


def test_the_checks_let_pass() -> None:
    harmless = ast.parse('"""cuda: a word"""\nprint("on cuda or npu", x.cudnn, "npu.py", "cuda:many")')
    assert not {*device_names(harmless), *namespaces(harmless)} and not VENDOR_PACKAGES & set(imported(harmless))
