"""``python -m paradigms``: what ``bash examples/paradigms.sh`` runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bash examples/paradigms.sh", description=(
        "Trains image-to-video paradigms alike, samples from the same noise, and measures in and out of domain. "
        "Started again, it goes on where it was."
    ))
    parser.add_argument("--scale", choices=("smoke", "tiny", "1.3b"), default="tiny",
                        help="smoke: two minutes; tiny: 80 minutes on two cores; 1.3b: your videos on a cluster")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/paradigms/SCALE)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: 2, one thread each; 1.3b: 1)")
    parser.add_argument("--stage", nargs="+", metavar="STAGE", help="only these stages, whose forerunners are done")
    parser.add_argument("--fresh", action="store_true", help="start over: remove what an earlier run made")
    parser.add_argument("--recipe", type=Path, metavar="FILE",
                        help="for --scale 1.3b: videos and models, as examples/paradigms/1.3b.yaml")
    arguments = parser.parse_args(words)
    jobs = arguments.jobs if arguments.jobs is not None else 1 if arguments.recipe else 2
    if jobs < 1:
        parser.error(f"--jobs is {jobs}; it must be at least 1")
    if arguments.fresh and arguments.stage:
        parser.error("--fresh removes the whole run, of which --stage wants a part; give one of them")
    if (arguments.scale == "1.3b") != (arguments.recipe is not None):
        parser.error("--scale 1.3b takes --recipe FILE, and no other scale does; see examples/paradigms/README.md")
    # The heavy imports, which --help does not need, come after the filters of their warnings.
    from megatron_flashi2v.cli.errors import tell_error, tell_interrupt
    from megatron_flashi2v.config.errors import UserError
    from megatron_flashi2v.runtime.logging import setup_logging

    setup_logging()
    from paradigms.driver import run_stages
    from paradigms.files import read_recipe
    from paradigms.settings import SCALES
    from paradigms.stages import Run

    output = arguments.output or Path("runs/paradigms") / arguments.scale
    try:
        run = (
            Run(settings=SCALES[arguments.scale], folder=output) if arguments.recipe is None
            else read_recipe(arguments.recipe, output)
        )
        run_stages(run, arguments.stage or (), jobs=jobs, fresh=arguments.fresh)
    except UserError as error:
        return tell_error("paradigms", error)
    except KeyboardInterrupt:
        return tell_interrupt("paradigms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
