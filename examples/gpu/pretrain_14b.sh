#!/usr/bin/env bash
# FlashI2V 14B on NVIDIA GPUs with torchrun. One node: bash examples/gpu/pretrain_14b.sh [flags of flashi2v train]
# Several, on each: NNODES=4 HEAD=10.0.0.1 bash examples/gpu/pretrain_14b.sh [flags of flashi2v train]
#
# Tensor 4 x context 2 fill a node, so that both talk over NVLink; half the tensor-parallel traffic of tensor 8. A GPU
# holds 14.3 G / 4 = 3.62 G parameters x (6 + 16/2) bytes = 51 GB on one node, where the optimizer is divided over the 2
# context ranks, and x (6 + 16/8) = 29 GB on four, with 7 GB of activations: inside 80 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/gpu/environment.sh

NNODES="${NNODES:-1}"
[ "$NNODES" = 1 ] && HEAD="${HEAD:-localhost}"
exec flashi2v torchrun --nnodes "$NNODES" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address of the first node}:${MASTER_PORT:-29500}" \
    train --config examples/recipes/14b.yaml --device cuda \
    --tensor-model-parallel-size 4 --context-parallel-size 2 --context-parallel-algo ulysses "$@"
