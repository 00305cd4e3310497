#!/usr/bin/env bash
# FlashI2V 14B on Ascend NPUs with sharded weights: 8 NPUs, 64 or 512, by NNODES 1, 8 or 64.
# One node: bash examples/ascend/pretrain_14b_sharded.sh [flags of flashi2v train]
# Several, on each: NNODES=8 HEAD=10.0.0.1 bash examples/ascend/pretrain_14b_sharded.sh [flags of flashi2v train]
#
# As examples/gpu/pretrain_14b_sharded.sh, but attention is all that is not computed again: 39 GB of state, up to 6 GB in
# flight and 7 GB of activations, inside 64 GB. Nobody has run sharded weights on an NPU yet; pretrain_14b.sh beside it
# divides layers instead, and is the one to start with.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/ascend/environment.sh

NNODES="${NNODES:-1}"
[ "$NNODES" = 1 ] && HEAD="${HEAD:-localhost}"
exec flashi2v torchrun --nnodes "$NNODES" --nproc-per-node "${NPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address of the first node}:${MASTER_PORT:-29500}" \
    train --config examples/recipes/14b.yaml --device npu \
    --tensor-model-parallel-size 1 --no-sequence-parallel --context-parallel-size 8 --context-parallel-algo ulysses \
    --data-parallel-sharding-strategy optim_grads_params --num-distributed-optimizer-instances "$NNODES" \
    --recompute-granularity skip_attention --hccl-buffer-sizes cp:200,dp_cp:200,default:50 "$@"
