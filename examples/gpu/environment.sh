# Sourced by the launch scripts beside it: what NVIDIA GPUs need in the environment, and why.
export CUDA_DEVICE_MAX_CONNECTIONS=1      # collectives and kernels keep the order they were issued in, so they overlap
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True   # less fragmentation with long sequences
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"    # threads of each rank on the host; unset, each would take every core
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"   # a broken link is named in the log, and nothing else is
