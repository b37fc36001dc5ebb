#!/usr/bin/env bash
# Build NVIDIA's apex with its CUDA extensions, unless they are installed.
#   bash docker/apex.sh COMMIT JOBS
set -euo pipefail
COMMIT="$1" JOBS="$2" PYTHON="${PYTHON:-python3}"
# Look for the modules without importing them: the extensions need libraries that only torch loads.
if "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("apex", "amp_C", "fused_weight_gradient_mlp_cuda"))))'; then
    echo "apex and its CUDA extensions are there"
    exit 0
fi
FOLDER="$(mktemp -d)"
trap 'rm -rf "$FOLDER"' EXIT
git init -q "$FOLDER"
git -C "$FOLDER" fetch -q --depth 1 "${APEX_SOURCE:-https://github.com/NVIDIA/apex}" "$COMMIT"
git -C "$FOLDER" checkout -q FETCH_HEAD
# Build against the installed torch, so without isolation and without dependencies.
APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS="$JOBS" \
    "$PYTHON" -m pip install --no-cache-dir --no-build-isolation --no-deps "$FOLDER"
