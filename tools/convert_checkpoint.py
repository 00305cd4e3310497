"""Megatron's habit: ``python tools/convert_checkpoint.py --from FORMAT PATH --to FORMAT PATH``."""

import sys

from megatron_flashi2v.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("convert", sys.argv[1:]))
