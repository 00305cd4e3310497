#!/usr/bin/env bash
# FlashI2V 1.3B on NVIDIA GPUs with torchrun. One node: bash examples/gpu/pretrain_1.3b.sh [flags of flashi2v train]
# Several, on each: NNODES=4 HEAD=10.0.0.1 bash examples/gpu/pretrain_1.3b.sh [flags of flashi2v train]
#
# The recipe's layout: a replica on each GPU. On 8 GPUs it holds 1.42 G parameters x (6 + 16/8) bytes = 11 GB and, with
# attention kept, 13 GB of activations: well inside 80 GB, so nothing of the model is divided.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/gpu/environment.sh

NNODES="${NNODES:-1}"
[ "$NNODES" = 1 ] && HEAD="${HEAD:-localhost}"
exec flashi2v torchrun --nnodes "$NNODES" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address of the first node}:${MASTER_PORT:-29500}" \
    train --config examples/recipes/1.3b.yaml --device cuda "$@"
