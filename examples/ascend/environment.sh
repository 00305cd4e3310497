# Sourced by the launch scripts beside it: what Ascend NPUs need in the environment, and why.
if [ -z "${ASCEND_HOME_PATH:-}" ]; then    # CANN's own environment; its path is cann since 8.5, and was ascend-toolkit
    options="$-"
    set +eu    # set_env.sh reads variables that may not be set
    for cann in {/usr/local,"$HOME"}/Ascend/{cann,ascend-toolkit}; do
        # shellcheck disable=SC1091
        if [ -f "$cann/set_env.sh" ]; then . "$cann/set_env.sh"; break; fi
    done
    for option in e u; do
        case "$options" in *"$option"*) set "-$option" ;; esac
    done
fi
: "${ASCEND_HOME_PATH:?is not set: first source set_env.sh of CANN, which is neither in /usr/local/Ascend/cann nor, as \
before CANN 8.5, in /usr/local/Ascend/ascend-toolkit}"
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1800}"   # seconds to meet; many nodes outlast the default of 120
export HCCL_EXEC_TIMEOUT=3600             # seconds of one collective, while others wait for a rank that writes files
export TASK_QUEUE_ENABLE=2                # operators are queued ahead of the device, by a thread of their own
export CPU_AFFINITY_CONF=1                # that thread and its rank stay on cores beside their NPU
export COMBINED_ENABLE=1                  # neighbouring copies of non-contiguous tensors become one
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True    # less fragmentation with long sequences
export MULTI_STREAM_MEMORY_REUSE=1        # memory of gradients on their way is used again as soon as they have arrived
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"    # threads of each rank on the host; unset, each would take every core
export ASCEND_GLOBAL_LOG_LEVEL=3          # errors only: CANN writes a line per operator otherwise
