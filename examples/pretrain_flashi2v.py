"""The script form of ``flashi2v train``, for launchers that take a file (msrun does)."""

import sys

from megatron_flashi2v.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:]))
