"""``python -m megatron_flashi2v`` is the console script ``flashi2v``."""

import sys

from megatron_flashi2v.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
