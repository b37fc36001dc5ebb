#!/usr/bin/env bash
""":"
# The paper's recipe at any size. This file is valid bash and valid Python, so both of these work:
#
#   bash examples/evomoe_llava.sh [train flags]
#   torchrun --nnodes=N examples/evomoe_llava.sh [train flags]
#
# bash starts torchrun with itself; torchrun runs it with Python. Data, tokenizer and output are named by the environment
# (see examples/evomoe_llava.yaml), anything else by flags, e.g. --preset phi-2 --stage route --config my.yaml.
# For bash:  NNODES (1)  GPUS_PER_NODE (what nvidia-smi lists, else 1)  RDZV_ENDPOINT host:port of the first node
set -euo pipefail
PYTHON="${PYTHON:-python3}"
GPUS="$( (nvidia-smi -L 2>/dev/null || true) | wc -l)"
NPROC="${GPUS_PER_NODE:-$(( GPUS > 0 ? GPUS : 1 ))}"
if [ "${NNODES:-1}" = 1 ]; then
    RDZV="--standalone"
else
    RDZV="--nnodes=$NNODES --rdzv-backend=c10d --rdzv-id=${RDZV_ID:-evomoe} --rdzv-endpoint=${RDZV_ENDPOINT:?set it to host:port of the first node}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m torch.distributed.run $RDZV --nproc-per-node="$NPROC" "$0" "$@"
":"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":  # checkpoint writers re-import this file in processes of their own
    sys.path.insert(0, str(ROOT))  # so that a checkout works without being installed
    from megatron_evomoe.cli import main

    sys.exit(main(["train", "--config", str(ROOT / "examples" / "evomoe_llava.yaml"), *sys.argv[1:]]))
