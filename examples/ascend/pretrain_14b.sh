#!/usr/bin/env bash
# FlashI2V 14B on several Ascend nodes with torchrun; run on every node:
#   NNODES=4 HEAD=10.0.0.1 bash examples/ascend/pretrain_14b.sh [flags of flashi2v train]
set -euo pipefail
cd "$(dirname "$0")/../.."

export HCCL_CONNECT_TIMEOUT=3600          # seconds; many nodes take long to meet
export HCCL_EXEC_TIMEOUT=1800             # seconds; a checkpoint may keep one rank busy
export TASK_QUEUE_ENABLE=2                # operators are queued ahead of the device
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True    # less fragmentation with long sequences

exec torchrun --nnodes "${NNODES:?number of nodes}" --nproc-per-node "${NPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address of the first node}:29500" \
    examples/pretrain_flashi2v.py --config examples/recipes/14b.yaml --device npu "$@"
