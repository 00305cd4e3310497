#!/usr/bin/env bash
# Check this checkout on this machine's card in at most five minutes (--budget SECONDS): one table and check_gpu.json.
# --rehearse runs the same on the CPU at toy sizes; --json FILE names the report; --only NAME ... picks steps.
exec python "$(dirname "$0")/check_gpu.py" "$@"
