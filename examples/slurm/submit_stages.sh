#!/usr/bin/env bash
# Submit one job per stage; each job waits until the previous one has succeeded:
#
#   bash examples/slurm/submit_stages.sh [sbatch flags] [-- train flags]
#   bash examples/slurm/submit_stages.sh --nodes=4 --gpus-per-node=8 -- --expert-model-parallel-size 4
#
# If a stage fails, Slurm removes the jobs of later stages. The same command again skips finished stages and resumes.
# STAGES replaces the list of stages, by default the recipe's "align warmup evolve route".
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
EVOMOE_ROOT="$(dirname "$(dirname "$HERE")")"
export EVOMOE_ROOT

sbatch_flags=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    sbatch_flags+=("$1")
    shift
done
if [ $# -gt 0 ]; then
    shift
fi

after=""
for stage in ${STAGES:-align warmup evolve route}; do
    waits=()
    if [ -n "$after" ]; then
        waits=(--dependency="afterok:$after" --kill-on-invalid-dep=yes)
    fi
    after="$(sbatch --parsable --job-name="evomoe-$stage" "${waits[@]}" "${sbatch_flags[@]}" "$HERE/evomoe_llava.sbatch" \
        --stage "$stage" "$@")"
    after="${after%%;*}" # in a federation sbatch prints id;cluster
    echo "$stage: job $after"
done
