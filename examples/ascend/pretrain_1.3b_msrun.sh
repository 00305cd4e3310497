#!/usr/bin/env bash
# FlashI2V 1.3B on Ascend NPUs with msrun.
# One node: bash examples/ascend/pretrain_1.3b_msrun.sh [flags of flashi2v train]
# Several, on each: NNODES=4 NODE_RANK=0 HEAD=10.0.0.1 bash examples/ascend/pretrain_1.3b_msrun.sh [flags of ...]
#
# Layout and sizes as in pretrain_1.3b.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/ascend/environment.sh

NNODES="${NNODES:-1}" NPUS="${NPUS:-8}"
[ "$NNODES" = 1 ] && HEAD="${HEAD:-127.0.0.1}" NODE_RANK=0
# --join: msrun waits, and its exit code is true. msrun starts the script once more as its scheduler; it leaves at once.
# The ranks meet one port above --master_port. Without --node_rank every worker would believe that it is rank 0.
exec msrun --worker_num "$((NNODES * NPUS))" --local_worker_num "$NPUS" --join True --log_dir runs/msrun_logs \
    --master_addr "${HEAD:?address of node 0}" --master_port "${MASTER_PORT:-8118}" --node_rank "${NODE_RANK:?0, 1, ... on each node}" \
    examples/pretrain_flashi2v.py --config examples/recipes/1.3b.yaml --device npu \
    --hccl-buffer-sizes dp_cp:200,default:50 "$@"
