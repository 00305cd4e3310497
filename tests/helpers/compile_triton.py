"""Compile every Triton kernel for a compute capability, without a GPU: ``compile_triton.py 90 [--usage]``.

Prints one line for each: name, dtype, variant; with --usage also the registers of a thread and the bytes it spills.
"""

from __future__ import annotations

import inspect
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashi2v_kernels.ada_layer_norm import triton as norm
from flashi2v_kernels.bias_gelu_tanh import triton as gelu
from flashi2v_kernels.gate_residual import triton as gate
from flashi2v_kernels.residual_norm import triton_fused as add
from flashi2v_kernels.rms_norm import triton as turn
from flashi2v_kernels.triton_launch import block_of, few_warps_of, warps_of

WIDTHS = (1536, 5120)
FLAGS = (False, True)
# what is fp32 whatever the activations' dtype is
FP32 = {"mean_ptr", "rstd_ptr", "rms_ptr", "sum_ptr", "d_sum_ptr", "cos_ptr", "sin_ptr", "shift_ptr", "scale_ptr",
        "gate_ptr", "part_ptr", "part_shift_ptr", "part_scale_ptr", "part_gate_ptr"}


def variants() -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Kernels with their constants, and the width that decides how many warps run them."""
    for width in WIDTHS:
        block = block_of(width)
        for kernel in (norm.norm_forward, norm.norm_backward, gate.gate_forward, gate.gate_backward):
            yield kernel, {"BLOCK": block}, block
        for kernel, gated in itertools.product((add.residual_norm_forward, add.residual_norm_backward), FLAGS):
            yield kernel, {"GATED": gated, "BLOCK": block}, block
        for kernel, own_sum, turned in itertools.product((turn.turn_forward, turn.turn_backward), FLAGS, FLAGS):
            yield kernel, {"HEAD": 128, "BLOCK": block, "OWN_SUM": own_sum, "TURN": turned}, block
    for kernel, has_bias in itertools.product((gelu.gelu_forward, gelu.gelu_backward), FLAGS):
        yield kernel, {"HAS_BIAS": has_bias, "BLOCK": gelu.COLUMNS}, gelu.COLUMNS


def warps(kernel: Any, block: int) -> int:
    """Warps that run a kernel, as its launch has them."""
    if kernel in (norm.norm_forward, add.residual_norm_forward, turn.turn_forward):
        return few_warps_of(block)
    return warps_of(block, most=32) if kernel is turn.turn_backward else warps_of(block)


def type_of(argument: str, dtype: str) -> str:
    """Triton's type of a kernel's argument, told from its name."""
    if argument.endswith("_ptr"):
        return "*fp32" if argument in FP32 else f"*{dtype}"
    return "fp32" if argument == "eps" else "i32"


def compile_one(kernel: Any, constants: dict[str, Any], block: int, dtype: str, capability: int) -> str:
    """Machine code of one kernel."""
    arguments = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else type_of(name, dtype) for name in arguments}
    # strides and pointers are multiples of 16, as they are for the models' shapes
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(arguments)
        if name.endswith(("_ptr", "_token", "_sample", "_head")) or name in ("width", "numbers")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps(kernel, block)}
    )
    assert compiled.asm["cubin"]
    usage = f": {_resources(compiled.asm['ptx'], capability)}" if "--usage" in sys.argv else ""
    variant = " ".join(f"{name}={value}" for name, value in constants.items())
    return f"{kernel.fn.__name__} {dtype} {variant}{usage}"


def _resources(ptx: str, capability: int) -> str:
    """ptxas' own words about the kernel."""
    ptxas = triton.knobs.nvidia.ptxas.path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        suffix = "a" if capability == 90 else ""
        told = subprocess.run(
            [ptxas, "-v", f"--gpu-name=sm_{capability}{suffix}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr
    registers, spilled = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
    return f"{registers[1] if registers else '?'} registers, {spilled[1] if spilled else '?'} bytes spilled"


def main() -> None:
    capability = int(sys.argv[1])
    for kernel, constants, block in variants():
        # the wide model is trained in bf16
        for dtype in ("bf16",) if block == block_of(WIDTHS[-1]) else ("bf16", "fp32"):
            sys.stdout.write(compile_one(kernel, constants, block, dtype, capability) + "\n")


if __name__ == "__main__":
    main()
