#!/usr/bin/env bash
# Install this package next to an image's own packages, without replacing any of them: pip is constrained to the installed
# versions, and fails if the package needs others.
#   bash docker/install.sh MEGATRON_CORE_VERSION EXTRAS
set -euo pipefail
CORE="$1" EXTRAS="$2" PYTHON="${PYTHON:-python3}"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PRESENT="$(mktemp)"
trap 'rm -f "$PRESENT"' EXIT
"$PYTHON" -m pip list --format=freeze > "$PRESENT"
"$PYTHON" -m pip install --no-cache-dir --no-build-isolation -c "$PRESENT" "megatron-core==$CORE" "$ROOT[$EXTRAS]"
"$PYTHON" "$ROOT/docker/verify.py" "$PRESENT"
