#!/usr/bin/env bash
# FlashI2V 1.3B on Ascend NPUs with torchrun. One node: bash examples/ascend/pretrain_1.3b.sh [flags of flashi2v train]
# Several, on each: NNODES=4 HEAD=10.0.0.1 bash examples/ascend/pretrain_1.3b.sh [flags of flashi2v train]
#
# The recipe's layout: a replica on each NPU. On 8 NPUs it holds 1.42 G parameters x (6 + 16/8) bytes = 11 GB and, with
# attention kept, 13 GB of activations: well inside 64 GB, so nothing of the model is divided.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/ascend/environment.sh

NNODES="${NNODES:-1}"
[ "$NNODES" = 1 ] && HEAD="${HEAD:-localhost}"
# Each group takes twice HCCL's buffer, 2 x 200 MB by default: only the gradients' group needs that, and not, say, the
# group of all ranks (`world`), which is one of the others here.
exec flashi2v torchrun --nnodes "$NNODES" --nproc-per-node "${NPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address of the first node}:${MASTER_PORT:-29500}" \
    train --config examples/recipes/1.3b.yaml --device npu \
    --hccl-buffer-sizes dp_cp:200,default:50 "$@"
