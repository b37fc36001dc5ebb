"""Convert a checkpoint to a Hugging Face directory; the same as ``python -m megatron_evomoe convert-to-hf``.

python tools/convert_to_hf.py runs/quickstart/route --output exported --verify
python tools/convert_to_hf.py runs/quickstart/evolve --dense --output exported-dense
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from megatron_evomoe.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert-to-hf", *sys.argv[1:]]))
