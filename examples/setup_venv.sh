#!/usr/bin/env bash
# Make a virtual environment if there is none and install the package with its tested versions.
#   source examples/setup_venv.sh        sets PYTHON to its interpreter
# VENV names the folder (.venv), BASE_PYTHON the interpreter to make it from (python3), CONSTRAINTS the pins.
# pip takes the torch build its own settings lead to: on Linux without a GPU, point PIP_INDEX_URL or PIP_FIND_LINKS at
# PyTorch's CPU wheels to save gigabytes of CUDA libraries.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
CONSTRAINTS="${CONSTRAINTS:-$ROOT/constraints.txt}"
PYTHON="$VENV/bin/python"
if [ ! -x "$PYTHON" ]; then
    "${BASE_PYTHON:-python3}" -m venv "$VENV"
fi
# reinstalled only when what is asked for changed
STAMP="$VENV/.installed"
WANTED="$(cat "$CONSTRAINTS" "$ROOT/setup.py" | cksum)"
if [ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]; then
    echo "installing into $VENV (a few minutes the first time)"
    "$PYTHON" -m pip install -q -c "$CONSTRAINTS" -e "$ROOT[dev]"
    echo "$WANTED" > "$STAMP"
fi
export PYTHON
