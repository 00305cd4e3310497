#!/usr/bin/env bash
# The default tests on torch 2.7.1, the version that CANN 9.0 and MindSpeed's core_r0.16.0 pair with:
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
if [ ! -e "$FOLDER/ready" ]; then
    python3 -m venv "$FOLDER"
    grep -vE '^(torch|triton)==' constraints.txt >"$FOLDER/constraints.txt"
    echo torch==2.7.1 >>"$FOLDER/constraints.txt"
    "$FOLDER/bin/python" -m pip install --quiet --disable-pip-version-check -c "$FOLDER/constraints.txt" -e '.[test]'
    touch "$FOLDER/ready"
fi
export PATH="$FOLDER/bin:$PATH" VIRTUAL_ENV="$FOLDER" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export CUDA_VISIBLE_DEVICES=""    # the tests are the CPU's, also where there is a GPU
python -c 'import torch; assert torch.__version__.startswith("2.7."), torch.__version__'
python -m pytest -p no:cacheprovider "$@"
