"""Time sampling beside diffusers' pipeline: ``python tools/bench_sampling.py --rounds 7 --json sampling.json``."""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_options import SamplingBenchmark

if __name__ == "__main__":
    options = tyro.cli(SamplingBenchmark, description=__doc__)
    from megatron_flashi2v.evaluation.bench_sampling import run

    sys.stdout.write(run(options))
