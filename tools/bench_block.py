"""Time one block beside diffusers': ``python tools/bench_block.py --model 1.3b --json block.json``."""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_block import BlockBenchmark, run

if __name__ == "__main__":
    sys.stdout.write(run(tyro.cli(BlockBenchmark, description=__doc__)))
