#!/usr/bin/env bash
# FlashI2V 14B on Ascend NPUs with msrun.
# One node: bash examples/ascend/pretrain_14b_msrun.sh [flags of flashi2v train]
# Several, on each: NNODES=8 NODE_RANK=0 HEAD=10.0.0.1 bash examples/ascend/pretrain_14b_msrun.sh [flags of ...]
#
# Tensor 4 with half the traffic of tensor 8, and two pipeline ranks, since 64 GB are too little for tensor 4 alone on
# one node. Four chunks of 5 blocks on each rank make the pipeline's bubble a quarter of its plain size: with 8 nodes,
# 8 microbatches of a replica pass through, and it is 1 part in 4 x 8. An NPU holds at most 1.86 G parameters: x 22
# bytes = 41 GB on one node, x (6 + 16/8) = 15 GB on eight; nine chunks are on their way at once, with 16 GB of
# activations.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/ascend/environment.sh

NNODES="${NNODES:-1}" NPUS="${NPUS:-8}"
[ "$NNODES" = 1 ] && HEAD="${HEAD:-127.0.0.1}" NODE_RANK=0
# --join: msrun waits, and its exit code is true. msrun starts the script once more as its scheduler; it leaves at once.
# The ranks meet one port above --master_port. Without --node_rank every worker would believe that it is rank 0.
exec msrun --worker_num "$((NNODES * NPUS))" --local_worker_num "$NPUS" --join True --log_dir runs/msrun_logs \
    --master_addr "${HEAD:?address of node 0}" --master_port "${MASTER_PORT:-8118}" --node_rank "${NODE_RANK:?0, 1, ... on each node}" \
    examples/pretrain_flashi2v.py --config examples/recipes/14b.yaml --device npu \
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 4 \
    --hccl-buffer-sizes tp:200,dp_cp:200,default:50 "$@"
