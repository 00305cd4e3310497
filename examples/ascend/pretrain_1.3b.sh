#!/usr/bin/env bash
# FlashI2V 1.3B on one Ascend node with msrun: bash examples/ascend/pretrain_1.3b.sh [flags of flashi2v train]
set -euo pipefail
cd "$(dirname "$0")/../.."

export HCCL_CONNECT_TIMEOUT=1200          # seconds; loading code on a shared file system can outlast the default 120
export TASK_QUEUE_ENABLE=2                # operators are queued ahead of the device
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True    # less fragmentation with long sequences

NPUS="${NPUS:-8}"
# --join: msrun waits, and its exit code is true. msrun starts the script once more as its scheduler; it leaves at once.
exec msrun --worker_num "$NPUS" --local_worker_num "$NPUS" --join True \
    examples/pretrain_flashi2v.py --config examples/recipes/1.3b.yaml --device npu "$@"
