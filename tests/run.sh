#!/usr/bin/env bash
# Sets up the tests' environment and runs them: bash tests/run.sh [pytest arguments; by default all tests].
# Uses the active virtual environment, or makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
ensure_environment '.[test]'
# Two test processes on two cores are slower than one with these: every operator here is small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest "$@"
