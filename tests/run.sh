#!/usr/bin/env bash
# Style check and the test suite, in an environment this script makes.
#   bash tests/run.sh [--full | --versions] [pytest arguments]
# --full adds the slow tests: the whole matrix of layouts, the chaos run, Slurm, several nodes.
# --versions repeats the others on Python 3.12 with megatron-core 0.19.2 where a python3.12 runs, and those of Hugging Face in and
# out on the newest transformers 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MODE=""
case "${1:-}" in --full | --versions) MODE="$1"; shift ;; esac
export OMP_NUM_THREADS=1

# repeat INTERPRETER VENV CONSTRAINTS [pytest arguments]: the tests that are not slow, in another environment
repeat() {
    BASE_PYTHON="$1" VENV="$2" CONSTRAINTS="$PWD/$3" \
        bash -c 'source examples/setup_venv.sh && "$PYTHON" -m pytest -m "not slow" "$@"' run "${@:4}"
}

if [ "$MODE" = "--versions" ]; then
    NEWER="$(command -v python3.12 || true)"
    if [ -n "$NEWER" ] && "$NEWER" -c '' 2>/dev/null; then
        echo "== $("$NEWER" --version) with megatron-core 0.19.2"
        repeat "$NEWER" "${VENV_312:-$PWD/.venv-py312}" constraints-core0.19.txt "$@"
    else
        echo "no python3.12 that runs: the megatron-core 0.19.2 half is skipped"
    fi
    echo "== Hugging Face in and out on transformers 4"
    repeat "${BASE_PYTHON:-python3}" "${VENV_TRANSFORMERS4:-$PWD/.venv-transformers4}" constraints-transformers4.txt \
        tests/unit/hf tests/parity "$@"
    exit
fi
source examples/setup_venv.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if [ "$MODE" = "--full" ]; then
    exec "$PYTHON" -m pytest "$@"
fi
exec "$PYTHON" -m pytest -m "not slow" "$@"
