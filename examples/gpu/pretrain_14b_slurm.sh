#!/usr/bin/env bash
#SBATCH --job-name=flashi2v-14b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# FlashI2V 14B on NVIDIA GPUs under Slurm: sbatch examples/gpu/pretrain_14b_slurm.sh [flags of flashi2v train]
# One task for each GPU; `flashi2v train` reads Slurm's own variables.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"

export CUDA_DEVICE_MAX_CONNECTIONS=1      # collectives and kernels keep the order they were issued in, so they overlap
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True   # less fragmentation with long sequences

exec srun python examples/pretrain_flashi2v.py --config examples/recipes/14b.yaml --device cuda "$@"
