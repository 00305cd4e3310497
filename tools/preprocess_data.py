"""``flashi2v prepare`` under the name that Megatron's users look for; the flags are the same."""

import sys

from megatron_flashi2v.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("prepare", sys.argv[1:]))
