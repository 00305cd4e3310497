"""Time a training step: ``python tools/bench_step.py --model 14b --num-layers 4 --peer diffusers --json step.json``."""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_step import StepBenchmark, run

if __name__ == "__main__":
    sys.stdout.write(run(tyro.cli(StepBenchmark, description=__doc__)))
