#!/usr/bin/env bash
# Check style and types and run the test suite, in an environment that this script creates.
#   bash tests/run.sh                    everything except the slow tests, in two processes
#   bash tests/run.sh PATH or options    only the tests that these pytest arguments select, in one process
#   bash tests/run.sh --full             the slow tests too: all layouts, the chaos run, Slurm, several nodes
#   bash tests/run.sh --coverage         the share of lines that the unit and parity tests and four files of tests/integration run
#   bash tests/run.sh --versions         the tests on Python 3.12 with megatron-core 0.19.2, if python3.12 is installed, and the
#                                        tests of Hugging Face imports and exports on the newest transformers 4
# Arguments after a mode are passed to pytest. The 20 slowest tests are listed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MODE=""
case "${1:-}" in --full | --versions | --coverage) MODE="$1"; shift ;; esac
export OMP_NUM_THREADS=1
LISTED=(--durations=20)
# loadfile keeps the tests of a file in one process, because they share trained models. Without reordering, the files keep
# the order of the folders, in which long files come first.
PARALLEL=(-n 2 --dist loadfile --no-loadscope-reorder)

# The other tests kill their processes or train dozens of layouts, which takes far longer while lines are traced.
TRACED=(tests/integration/test_{stages,export,resume,commands}.py tests/parity tests/unit --ignore tests/unit/docs)

# repeat INTERPRETER VENV CONSTRAINTS [pytest arguments]: run the tests that are not slow in another environment.
repeat() {
    BASE_PYTHON="$1" VENV="$2" CONSTRAINTS="$PWD/$3" \
        bash -c 'source examples/setup_venv.sh && "$PYTHON" -m pytest -m "not slow" "$@"' run "${PARALLEL[@]}" "${LISTED[@]}" "${@:4}"
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
if [ -z "$MODE" ] && [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest -m "not slow" "${LISTED[@]}" "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
case "$MODE" in
    --full) exec "$PYTHON" -m pytest "${LISTED[@]}" "$@" ;;
    --coverage) exec "$PYTHON" -m pytest -m "not slow" "${PARALLEL[@]}" "${LISTED[@]}" --cov "${TRACED[@]}" "$@" ;;
    *) exec "$PYTHON" -m pytest -m "not slow" "${PARALLEL[@]}" "${LISTED[@]}" ;;
esac
