#!/usr/bin/env bash
#SBATCH --job-name=flashi2v-14b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --requeue                 # after a node's failure or preemption: the run goes on from its --save folder
#SBATCH --signal=USR1@300         # five minutes before the time limit: save and leave
# FlashI2V 14B on NVIDIA GPUs under Slurm: sbatch examples/gpu/pretrain_14b_slurm.sh [flags of flashi2v train]
# One task for each GPU; `flashi2v train` reads Slurm's own variables. One node: sbatch --nodes=1.
#
# Tensor 4 x context 2 fill a node, so that both talk over NVLink; half the tensor-parallel traffic of tensor 8. With
# 8 replicas a GPU holds 14.3 G / 4 = 3.62 G parameters x (6 + 16/16) bytes = 25 GB (the optimizer is divided over
# replicas and context ranks), with 7 GB of activations: inside 80 GB.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
. examples/gpu/environment.sh

exec srun --kill-on-bad-exit=1 python examples/pretrain_flashi2v.py --config examples/recipes/14b.yaml --device cuda \
    --tensor-model-parallel-size 4 --context-parallel-size 2 --context-parallel-algo ulysses "$@"
