"""Time every implementation of every operator: ``python tools/bench_kernels.py --models 14b --json kernels.json``."""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_options import KernelBenchmark

if __name__ == "__main__":
    options = tyro.cli(KernelBenchmark, description=__doc__)
    from megatron_flashi2v.evaluation.bench_kernels import run

    sys.stdout.write(run(options))
