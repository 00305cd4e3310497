#!/usr/bin/env bash
#SBATCH --job-name=flashi2v-1.3b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --requeue                 # after a node's failure or preemption: the run goes on from its --save folder
#SBATCH --signal=USR1@300         # five minutes before the time limit: save and leave
# FlashI2V 1.3B on NVIDIA GPUs under Slurm: sbatch examples/gpu/pretrain_1.3b_slurm.sh [flags of flashi2v train]
# One task for each GPU; `flashi2v train` reads Slurm's own variables. One node: sbatch --nodes=1.
# A replica on each of 32 GPUs: 1.42 G parameters x (6 + 16/32) bytes = 9 GB; two samples a step for each replica.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
. examples/gpu/environment.sh

exec srun --kill-on-bad-exit=1 python examples/pretrain_flashi2v.py --config examples/recipes/1.3b.yaml --device cuda "$@"
