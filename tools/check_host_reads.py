"""Refuse a training step in which the host reads more than once, after a step that makes what lasts.

A read waits for all that was queued before. Exit code 1 and a traceback tell where another one happens.
"""

import sys

import tyro

from megatron_flashi2v.evaluation.bench_options import StepBenchmark

if __name__ == "__main__":
    options = tyro.cli(StepBenchmark, description=__doc__)
    from megatron_flashi2v.evaluation.bench_step import host_reads

    sys.stdout.write(f"{host_reads(options)} read by the host in a step\n")
