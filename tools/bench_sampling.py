"""Time sampling beside diffusers' pipeline: ``python tools/bench_sampling.py --rounds 7 --json sampling.json``."""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_sampling import SamplingBenchmark, run

if __name__ == "__main__":
    sys.stdout.write(run(tyro.cli(SamplingBenchmark, description=__doc__)))
