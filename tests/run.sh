#!/usr/bin/env bash
# Sets up the tests' environment and runs them: bash tests/run.sh [pytest arguments; by default all tests].
# Uses the active virtual environment, or makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
ensure_environment '.[test]'
# Two test processes on two cores are slower than one with these: every operator here is small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ $# -eq 0 ] || exec python -m pytest "$@"
# Tests of one process each share the cores; those that start ranks of their own come after, one at a time.
status=0
python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile tests/unit tests/golden tests/parity || status=$?
python -m pytest tests/accelerator tests/distributed tests/faults || status=$?
exit "$status"
