"""Time one block beside diffusers': ``python tools/bench_block.py --model 1.3b --json block.json``."""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_options import BlockBenchmark

if __name__ == "__main__":
    options = tyro.cli(BlockBenchmark, description=__doc__)
    from megatron_flashi2v.evaluation.bench_block import run

    sys.stdout.write(run(options))
