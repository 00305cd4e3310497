"""Time every implementation of every operator: ``python tools/bench_kernels.py --models 14b --json kernels.json``."""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_kernels import KernelBenchmark, run

if __name__ == "__main__":
    sys.stdout.write(run(tyro.cli(KernelBenchmark, description=__doc__)))
