#!/usr/bin/env bash
# Run EvoMoE end to end on a laptop: real images, four stages, two processes, a results table and figures.
#   bash examples/quickstart.sh [train flags]     for example --seed 2
# Every call deletes runs/quickstart and starts from the beginning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="${EXTRAS:-quickstart}" source examples/setup_venv.sh
RUN=runs/quickstart
DATA=() TOWER=() TRAIN=()
if [ -n "${SMOKE:-}" ]; then # for tests: the same steps in a minute
    DATA=(--instruct-samples 64 --caption-samples 32 --heldout-samples 16 --tower-pictures 64)
    TOWER=(--steps 5)
    TRAIN=(--train-iters 2)
fi
export OMP_NUM_THREADS=1
rm -rf "$RUN"
echo "== data: handwritten digits to image-text shards"
"$PYTHON" examples/digits/build_data.py --output "$RUN/data" "${DATA[@]}"
echo "== vision tower: pretrained on the training scans, stands for CLIP"
"$PYTHON" examples/digits/pretrain_tower.py --config examples/digits/quickstart.yaml --data "$RUN/data/tower.npz" --output "$RUN/tower" "${TOWER[@]}"
echo "== train: align, warmup, evolve, route; 2 processes, expert parallel 2"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_evomoe train \
    --config examples/digits/quickstart.yaml "${TRAIN[@]}" "$@"
"$PYTHON" -m megatron_evomoe plot --run "$RUN" --output "$RUN/figures"
echo "results: $RUN/tables.jsonl, $RUN/summary.json, $RUN/metrics.jsonl; figures: $RUN/figures"
