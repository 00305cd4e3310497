#!/usr/bin/env bash
# FlashI2V 1.3B on one node of NVIDIA GPUs: bash examples/gpu/pretrain_1.3b.sh [flags of flashi2v train]
set -euo pipefail
cd "$(dirname "$0")/../.."

export CUDA_DEVICE_MAX_CONNECTIONS=1      # collectives and kernels keep the order they were issued in, so they overlap
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True   # less fragmentation with long sequences

exec torchrun --standalone --nproc-per-node "${GPUS:-8}" examples/pretrain_flashi2v.py \
    --config examples/recipes/1.3b.yaml --device cuda "$@"
