#!/usr/bin/env bash
# Run everything that needs a GPU, in at most 20 minutes and without a network: installation, tests/gpu, benchmarks.
#   bash benchmarks/gpu.sh [--tiny] [WHEELS]
# WHEELS     folder of wheels, an argument or a variable: exactly these are installed. Without it nothing is installed.
# OUT        folder for results.json, results.md and the output of each step (benchmarks/results; with --tiny runs/gpu-tiny)
# PYTHON     interpreter to start from (python3)
# VENV       environment to create (.venv-gpu)
# ONLY       names of the steps to run (all: tests router router-long layer step peer checkpoint)
# --tiny     tiny models, with or without a GPU; shows that the script works and measures nothing
# A step that fails or takes too long is reported and does not stop the other steps; the exit status is then 1.
set -euo pipefail
TINY=""
if [ "${1:-}" = "--tiny" ]; then
    TINY=1
    shift
fi
WHEELS="$(realpath -m "${1:-${WHEELS:-/nonexistent}}")"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DEFAULT="$ROOT/benchmarks/results"
[ -z "$TINY" ] || DEFAULT="$ROOT/runs/gpu-tiny"
OUT="$(realpath -m "${OUT:-$DEFAULT}")"
cd "$ROOT"
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-$PWD/.venv-gpu}"
STARTED=$SECONDS
LIMIT=1200

if [ -z "$TINY" ] && ! nvidia-smi -L > /dev/null 2>&1 && [ ! -e /dev/nvidiactl ]; then
    echo "no GPU here (no nvidia-smi that finds one, no /dev/nvidiactl): nothing is tested or measured. --tiny runs the same steps with tiny models."
    exit 0
fi

install_wheels() {
    local torch site
    # The folder of packages that contains torch, if torch is installed.
    torch="$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' 2> /dev/null || true)"
    "$PYTHON" -m venv ${torch:+--system-site-packages} "$VENV"
    site="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # If PYTHON is itself in an environment, --system-site-packages gives the base installation's packages, not that
    # environment's. A .pth file then adds the folder with torch.
    [ -z "$torch" ] || "$VENV/bin/python" -c 'import torch' 2> /dev/null || echo "$torch" > "$site/base.pth"
    # One command for all wheels, because two of Transformer Engine's wheels share a folder.
    "$VENV/bin/python" -m pip install -q --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
    # Transformer Engine looks for CUDA's libraries only in the environment's own folder.
    [ ! -d "$torch/nvidia" ] || [ -e "$site/nvidia" ] || ln -s "$torch/nvidia" "$site/nvidia"
}

mkdir -p "$OUT"
rm -f "$OUT"/steps.tsv "$OUT"/tests.xml "$OUT"/{router,router-long,layer,step,peer,checkpoint,results}.json
# step NAME SECONDS COMMAND…: run a command for at most SECONDS, and never beyond the time limit of the whole script.
step() {
    local name="$1" seconds="$2" left=$((LIMIT - (SECONDS - STARTED))) before=$SECONDS rc=0
    shift 2
    [[ -z "${ONLY:-}" || "$name" == install || " $ONLY " == *" $name "* ]] || return 0
    seconds=$((seconds < left ? seconds : left))
    echo "== $name (at most ${seconds} s)"
    if [ "$seconds" -gt 0 ]; then
        timeout -k 10 "$seconds" "$@" > "$OUT/$name.log" 2>&1 || rc=$?
    else
        rc=124
        echo "no time was left" > "$OUT/$name.log"
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$rc" "$((SECONDS - before))" "$*" >> "$OUT/steps.tsv"
    [ "$rc" -eq 0 ] || echo "   failed with $rc: $(tail -n 1 "$OUT/$name.log")"
}

if [ -d "$WHEELS" ]; then
    export PYTHON VENV WHEELS
    export -f install_wheels
    step install 150 bash -euo pipefail -c install_wheels
    [ ! -x "$VENV/bin/python" ] || PYTHON="$VENV/bin/python"
elif [ "$WHEELS" != /nonexistent ]; then
    echo "$WHEELS is not a folder" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ ! -d /usr/local/cuda/include ] || export NVTE_CUDA_INCLUDE_DIR="${NVTE_CUDA_INCLUDE_DIR:-/usr/local/cuda/include}"

TESTS=(-m pytest -rs -p no:cacheprovider --junitxml "$OUT/tests.xml" tests/gpu)
if [ -n "$TINY" ]; then
    ROUTER=(--tokens 32 --width 64 --hidden 2 --rank 2 --ffn 64 --rounds 1 --threads 1)
    step tests 180 "$PYTHON" "${TESTS[@]}"
    step router 180 "$PYTHON" benchmarks/router.py "${ROUTER[@]}" --output "$OUT/router.json"
    step layer 180 "$PYTHON" benchmarks/layer.py --tiny --train router experts --output "$OUT/layer.json"
    step step 180 "$PYTHON" benchmarks/step.py --tiny --models 1.8b --stages warmup route --output "$OUT/step.json"
    step peer 180 "$PYTHON" benchmarks/peer.py --tiny --output "$OUT/peer.json"
    step checkpoint 180 "$PYTHON" benchmarks/checkpoint.py --hidden 64 --layers 2 --rounds 1 --output "$OUT/checkpoint.json"
else
    ROUTER=(--dtype bf16 --width 2048 4096)
    step tests 300 "$PYTHON" "${TESTS[@]}" tests/unit/moe/test_dtr_triton.py
    step router 120 "$PYTHON" benchmarks/router.py "${ROUTER[@]}" --tokens 4096 16384 --output "$OUT/router.json"
    # Θ of 64k tokens may need more memory than the GPU has; that row is then left out.
    step router-long 60 "$PYTHON" benchmarks/router.py "${ROUTER[@]}" --tokens 65536 \
        --subjects linear naive masked factored fused ffn --output "$OUT/router-long.json"
    step layer 60 "$PYTHON" benchmarks/layer.py --models 1.8b 7b --train router experts --output "$OUT/layer.json"
    step step 330 "$PYTHON" benchmarks/step.py --output "$OUT/step.json"
    step peer 120 "$PYTHON" benchmarks/peer.py --output "$OUT/peer.json"
    step checkpoint 60 "$PYTHON" benchmarks/checkpoint.py --output "$OUT/checkpoint.json"
fi
"$PYTHON" benchmarks/summary.py "$OUT" ${TINY:+--tiny}
