#!/usr/bin/env bash
# Does concatenating the image leak it? Four image-to-video paradigms, trained alike and measured alike, on one page.
#
#   bash examples/paradigms.sh --scale smoke   two minutes on two cores: whether it all runs
#   bash examples/paradigms.sh                 --scale tiny: 80 minutes on two cores
#   bash examples/paradigms.sh --scale 1.3b --recipe examples/paradigms/1.3b.yaml   your videos, on a cluster
#   bash examples/paradigms.sh --help          one stage, another folder, more runs at a time
#
# What an earlier call finished is reused. The page is runs/paradigms/SCALE/report.html.
set -euo pipefail
cd "$(dirname "$0")/.."

. examples/environment.sh
ensure_environment .
export OMP_NUM_THREADS=1   # a run on each core
export HF_HUB_OFFLINE=1    # every model is a folder here
export PYTHONPATH="$PWD/examples${PYTHONPATH:+:$PYTHONPATH}"

exec python -m paradigms "$@"
