#!/usr/bin/env bash
# The default tests on torch 2.7.1, the version that CANN 9.0 and MindSpeed's core_r0.16.0 pair with, and on Python 3.10
# where there is one:
#
#   bash tests/accelerator/torch_2_7.sh [FOLDER] [pytest arguments]
#
# The environment goes into FOLDER, where it stays for the next time, or into a temporary one. The registry's build of
# torch 2.7.1 brings CUDA's libraries, 3 GB to download and 6 GB on disk, and runs on CPUs without them being used.
set -euo pipefail
cd "$(dirname "$0")/../.."

FOLDER=""
case "${1:-}" in
    "" | -* | tests*) FOLDER="$(mktemp -d)"; trap 'rm -rf "$FOLDER"' EXIT ;;
    *) FOLDER="$(realpath -m "$1")"; shift ;;
esac
if ! "$FOLDER/bin/python" -c 'import torch' 2>/dev/null; then
    # The first that starts: a python3.10 may be there that only says that no version of it is chosen.
    for python in python3.10 python3; do
        if "$python" -m venv "$FOLDER" 2>/dev/null; then break; fi
    done
    "$FOLDER/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.7.1
fi
# shellcheck disable=SC1091
. "$FOLDER/bin/activate"
. examples/environment.sh
ensure_environment '.[test]'
export CUDA_VISIBLE_DEVICES=""    # the tests are the CPU's, also where there is a GPU
python -c 'import sys, torch; assert torch.__version__.startswith("2.7."), torch.__version__; print(sys.version, torch.__version__)'
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -p no:cacheprovider "$@"
