#!/usr/bin/env bash
# FlashI2V 14B on Ascend NPUs with torchrun. One node: bash examples/ascend/pretrain_14b.sh [flags of flashi2v train]
# Several, on each: NNODES=4 HEAD=10.0.0.1 bash examples/ascend/pretrain_14b.sh [flags of flashi2v train]
#
# The recipe's layout: tensor 8 with sequence parallelism, inside a node. An NPU holds 14.3 G / 8 = 1.84 G parameters x
# 22 bytes = 40 GB on one node, x (6 + 16/4) = 18 GB on four, with 7 GB of activations: inside 64 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/ascend/environment.sh

NNODES="${NNODES:-1}"
[ "$NNODES" = 1 ] && HEAD="${HEAD:-localhost}"
# Each group takes twice HCCL's buffer, 2 x 200 MB by default: only the tensor and the gradients' group need that, and not,
# say, the group of all ranks (`world`), which is one of the others here.
exec flashi2v torchrun --nnodes "$NNODES" --nproc-per-node "${NPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address of the first node}:${MASTER_PORT:-29500}" \
    train --config examples/recipes/14b.yaml --device npu \
    --hccl-buffer-sizes tp:200,dp_cp:200,default:50 "$@"
