#!/usr/bin/env bash
# FlashI2V 14B on NVIDIA GPUs with sharded weights: 8 GPUs, 64 or 512, by NNODES 1, 8 or 64.
# One node: bash examples/gpu/pretrain_14b_sharded.sh [flags of flashi2v train]
# Several, on each: NNODES=8 HEAD=10.0.0.1 bash examples/gpu/pretrain_14b_sharded.sh [flags of flashi2v train]
#
# A node's 8 GPUs divide weights, gradients and the optimizer's state, and each sample's tokens by Ulysses; between nodes
# only gradients travel, once in an iteration. A GPU holds 14.3 G / 8 parameters x (18 + 4) bytes = 39 GB, and up to
# 6 GB in flight, with 17 GB of activations: inside 80 GB. By arithmetic it is faster than tensor parallelism
# (megatron_flashi2v/parallel/README.md); nobody has measured it yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/gpu/environment.sh
export CUDA_DEVICE_MAX_CONNECTIONS=8      # weights are gathered beside the computation, not in one order with it

NNODES="${NNODES:-1}"
[ "$NNODES" = 1 ] && HEAD="${HEAD:-localhost}"
exec flashi2v torchrun --nnodes "$NNODES" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address of the first node}:${MASTER_PORT:-29500}" \
    train --config examples/recipes/14b.yaml --device cuda \
    --tensor-model-parallel-size 1 --no-sequence-parallel --context-parallel-size 8 --context-parallel-algo ulysses \
    --data-parallel-sharding-strategy optim_grads_params --num-distributed-optimizer-instances "$NNODES" \
    --recompute-granularity selective "$@"
