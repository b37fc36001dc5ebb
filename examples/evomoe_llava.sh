#!/usr/bin/env bash
""":"
# The paper's recipe at any size. This file is valid bash and valid Python, so both of these work:
#
#   bash examples/evomoe_llava.sh [train flags]
#   torchrun --nnodes=N examples/evomoe_llava.sh [train flags]
#
# Run by bash, the file starts torchrun with itself as the script, which torchrun runs with Python. Environment variables give
# data, tokenizer and output (see examples/evomoe_llava.yaml); flags give the rest, for example
# --preset phi-2 --stage route --config my.yaml. Further variables for bash:
#   NNODES         number of nodes (1)
#   GPUS_PER_NODE  processes per node (the number of GPUs that nvidia-smi lists, or 1)
#   RDZV_ENDPOINT  host:port of the first node, needed with several nodes
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

if __name__ == "__main__":  # the processes that write checkpoints import this file again
    sys.path.insert(0, str(ROOT))  # so that a checkout works without being installed
    from megatron_evomoe.cli import main

    sys.exit(main(["train", "--config", str(ROOT / "examples" / "evomoe_llava.yaml"), *sys.argv[1:]]))
