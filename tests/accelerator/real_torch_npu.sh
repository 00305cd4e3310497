#!/usr/bin/env bash
# Our NPU implementations against the real torch_npu without an NPU: bash tests/accelerator/real_torch_npu.sh [FOLDER]
# Installs the wheel that matches the active environment's torch (44 MB; TORCH_NPU names another version) into FOLDER (by
# default a temporary one), where it cannot disturb other tests, and builds C stubs of the ACL runtime beside it
# (acl_stubs/ascendcl.c; needs gcc).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
folder="${1:-$(mktemp -d)}"
[ $# -gt 0 ] || trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/stubs"

torch="$(python -c 'import torch; print(torch.__version__.partition("+")[0])')"
case "$torch" in
    2.7.1) matching=2.7.1.post4 ;;    # of the wheels for torch 2.7.1, the one for CANN 9.0
    *) matching="$torch" ;;
esac
[ -d "$folder/torch_npu" ] || python -m pip install --quiet --no-deps --target "$folder" "torch_npu==${TORCH_NPU:-$matching}"
# torch_npu looks for functions in each of these libraries by name.
for library in ascendcl hccl acl_op_compiler ge_runner graph acl_tdt_channel; do
    gcc -w -shared -fPIC -o "$folder/stubs/lib$library.so" "$here/acl_stubs/ascendcl.c"
done

cd "$root"
# Without the first, torch would import torch_npu by itself; with the second, a call's error is raised by the call.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 ASCEND_LAUNCH_BLOCKING=1 ASCEND_GLOBAL_LOG_LEVEL=4
export LD_LIBRARY_PATH="$folder/stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="$folder:$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
python -m pytest tests/accelerator/real_torch_npu.py -p no:cacheprovider --override-ini="addopts=--import-mode=importlib" -q
