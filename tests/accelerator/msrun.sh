#!/usr/bin/env bash
# A real msrun job, two workers on the CPU: bash tests/accelerator/msrun.sh [FOLDER]
#
# mindspore, which brings msrun, takes 0.8 GB to download and 2.5 GB installed, so it is not in the default tests'
# environment. It goes into an environment of its own on top of theirs: in FOLDER, where it stays for the next time, or
# in a temporary one. Needs a Python that mindspore has a build for (3.10 to 3.12).
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/environment.sh
ensure_environment '.[test]'

FOLDER="${1:-}"
if [ -z "$FOLDER" ]; then
    FOLDER="$(mktemp -d)"
    trap 'rm -rf "$FOLDER"' EXIT
fi
if [ ! -x "$FOLDER/bin/msrun" ]; then
    python -m venv "$FOLDER"
    # addsitedir also follows the .pth files of the tests' environment, such as the one of this package
    python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
        >"$("$FOLDER/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests_environment.pth"
    "$FOLDER/bin/python" -m pip install --quiet --disable-pip-version-check mindspore==2.10.0
fi
export PATH="$FOLDER/bin:$PATH" OMP_NUM_THREADS=1
"$FOLDER/bin/python" -m pytest tests/accelerator/test_msrun.py -v -p no:cacheprovider
