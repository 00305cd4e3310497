"""Time a training step: ``python tools/bench_step.py --model 14b --num-layers 4 --peer diffusers --json step.json``.

Under torchrun it times one of several ranks, and how much of their communication nothing hides:
``torchrun --nproc-per-node 8 tools/bench_step.py --model 14b --parallel.context-parallel-size 8
--parallel.data-parallel-sharding-strategy optim_grads_params``.
"""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_options import StepBenchmark

if __name__ == "__main__":
    options = tyro.cli(StepBenchmark, description=__doc__)
    from megatron_flashi2v.evaluation.bench_step import run

    sys.stdout.write(run(options))
