#!/usr/bin/env bash
# Style check and the whole test suite, in an environment this script makes.
#   bash tests/run.sh [--full] [pytest arguments]
# --full adds the slow tests, repeats the others on Python 3.12 with megatron-core 0.19.2 where a python3.12 runs, and those of
# Hugging Face in and out on the newest transformers 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FULL=""
if [ "${1:-}" = "--full" ]; then
    FULL=1
    shift
fi
source examples/setup_venv.sh
export OMP_NUM_THREADS=1
"$PYTHON" -m ruff check .
if [ -z "$FULL" ]; then
    exec "$PYTHON" -m pytest -m "not slow" "$@"
fi
"$PYTHON" -m pytest "$@"
NEWER="$(command -v python3.12 || true)"
if [ -n "$NEWER" ] && "$NEWER" -c '' 2>/dev/null; then
    echo "== again on $("$NEWER" --version) with megatron-core 0.19.2"
    BASE_PYTHON="$NEWER" VENV="${VENV_312:-$PWD/.venv-py312}" CONSTRAINTS="$PWD/constraints-core0.19.txt" \
        bash -c 'source examples/setup_venv.sh && "$PYTHON" -m pytest -m "not slow" "$@"' run "$@"
else
    echo "no python3.12 that runs: the megatron-core 0.19.2 half is skipped"
fi
echo "== Hugging Face in and out again on transformers 4"
VENV="${VENV_TRANSFORMERS4:-$PWD/.venv-transformers4}" CONSTRAINTS="$PWD/constraints-transformers4.txt" \
    bash -c 'source examples/setup_venv.sh && "$PYTHON" -m pytest -m "not slow" tests/unit/hf tests/parity "$@"' run "$@"
